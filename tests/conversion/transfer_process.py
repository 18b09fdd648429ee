"""A program: one end of a transfer, for the tests that kill it, watch its memory or look at what has come.

    python transfer_process.py {sender|receiver} ROUTE.json {lives|dies|measures|tells} [DEVICE]

A sender that dies kills itself in the middle of bucket 5 of 16; an end that measures says how many bytes its process
grew by at most, above the tensors, while it carried two versions of 48 MiB; a receiver that tells prints the digest of
its tensor after each of three versions.
"""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from conversion.plan import WeightPlan, plan
from conversion.tiles import Tile
from conversion.transfer.route import Route

BUCKET_BYTES = 256
DIES_AT = 5
LARGE_ROWS, LARGE_BUCKET_BYTES = 12288, 8 << 20  # of 1024 numbers: one embedding, six buckets


def one_tensor(rows: int, columns: int) -> WeightPlan:
    tile = ("w", (0, rows), (0, columns))
    return plan([Tile(0, "a", *tile)], [Tile(0, "b", *tile)])


PLAN = one_tensor(64, 16)


def dying(sender: Any) -> Any:
    """The same sender, which kills itself in the middle."""
    pack = sender._pack

    def pack_or_die(number: int) -> None:
        if number == DIES_AT:
            os.kill(os.getpid(), signal.SIGKILL)
        pack(number)

    sender._pack = pack_or_die
    return sender


def memory_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(bytes(tensor.cpu().contiguous().view(torch.uint8).flatten().tolist())).hexdigest()


def main(role: str, route: Route, fate: str, device: str = "cpu") -> None:
    way, shape = (PLAN, (64, 16)) if fate != "measures" else (one_tensor(LARGE_ROWS, 1024), (LARGE_ROWS, 1024))
    tensors = {"a" if role == "sender" else "b": torch.ones(shape, device=device)}
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = memory_bytes("VmRSS")
    make = route.sender if role == "sender" else route.receiver
    end: Any = make(way, 0, tensors, torch.float32)
    if fate == "dies":
        end = dying(end)
    print("ready", flush=True)
    if fate == "measures":
        sys.stdin.readline()  # both ends are there
    for version in range({"measures": 2, "tells": 3}.get(fate, 1)):
        (end.send if role == "sender" else end.receive)(version)
        if fate == "tells":
            print(digest(tensors["b"]), flush=True)
            sys.stdin.readline()
    if fate == "measures":
        print(json.dumps({"grown": memory_bytes("VmHWM") - before}), flush=True)
        sys.stdin.readline()
    end.close()


if __name__ == "__main__":
    main(sys.argv[1], Route(**json.loads(Path(sys.argv[2]).read_text())), *sys.argv[3:])
