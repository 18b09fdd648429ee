"""A program: one end of a transfer, for the tests that kill it.

    python transfer_process.py {sender|receiver} FOLDER

The sender kills itself in the middle of bucket 5 of 16; the receiver lives.
"""

import os
import signal
import sys

import torch

from conversion.plan import plan
from conversion.tiles import Tile
from conversion.transfer.shared_memory import SharedMemoryReceiver, SharedMemorySender

PLAN = plan([Tile(0, "a", "w", (0, 64), (0, 16))], [Tile(0, "b", "w", (0, 64), (0, 16))])
BUCKET_BYTES = 256
DIES_AT = 5


class DyingSender(SharedMemorySender):
    def _pack(self, number: int) -> None:
        if number == DIES_AT:
            os.kill(os.getpid(), signal.SIGKILL)
        super()._pack(number)


if __name__ == "__main__":
    role, folder = sys.argv[1:]
    if role == "sender":
        sender = DyingSender(PLAN, 0, {"a": torch.ones(64, 16)}, folder, bucket_bytes=BUCKET_BYTES)
        print("ready", flush=True)
        sender.send()
    else:
        receiver = SharedMemoryReceiver(PLAN, 0, {"b": torch.zeros(64, 16)}, folder, bucket_bytes=BUCKET_BYTES)
        print("ready", flush=True)
        receiver.receive()
