"""A program: all ends of a publish through a process group, a process each.

    python group_process.py FOLDER {none|late|ended}

The policy's ranks 0 and 1 (data parallel, so that they share the load) and two engines of two workers. Each end writes
what it counted, and a worker what it then holds, to FOLDER; whoever fails writes its error. With "late" rank 1 never
sends, with "ended" its process ends after the first of two.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_models import config, empty_world, random_weights, reference_world
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from conversion.families import model_from_config
from conversion.plan import plan
from conversion.tiles import ParallelLayout
from conversion.transfer import TransferError
from conversion.transfer.process_group import GroupReceiver, GroupSender, World

MODEL = model_from_config(config("qwen2"))
LAYOUT = ParallelLayout(data=2)
PLAN = plan(MODEL.megatron_tiles(LAYOUT), MODEL.vllm_tiles(2))
BUCKET_BYTES = 3000


def run(number: int, world: World, folder: Path, fault: str) -> None:
    bounds: dict[str, Any] = {"bucket_bytes": BUCKET_BYTES, "timeout_seconds": 1.0 if fault == "late" else 60.0}
    counted: dict[str, int] = {}
    tensors = {}
    try:
        if number < 2:
            shapes = {r: MODEL.megatron_shapes(LAYOUT, r) for r in range(2)}
            weights = reference_world(MODEL.megatron_tiles(LAYOUT), random_weights(MODEL), empty_world(shapes))
            sender = GroupSender(PLAN, number, weights[number], world, torch.float32, **bounds)
            sizes = messages_of(sender, "send")
            for version in (3, 4):
                if fault == "late" and number == 1:
                    time.sleep(2.5)
                    return
                if fault == "ended" and number == 1 and version == 4:
                    os._exit(0)  # no farewell
                sender.send(version)
            counted = {"held": buffer_bytes(sender), "sent": sum(sizes), "packed": sum(sender._sizes)}
        else:
            engine, rank = divmod(number - 2, 2)
            tensors = empty_world({0: MODEL.vllm_shapes(2, rank)})[0]
            receiver = GroupReceiver(PLAN, rank, tensors, world, torch.float32, engine=engine, **bounds)
            sizes = messages_of(receiver, "receive")
            for version in (3, 4):
                receiver.receive(version)
            counted = {"held": buffer_bytes(receiver), "received": sum(sizes)}
    except TransferError as error:
        (folder / f"{number}.error").write_text(str(error))
        return
    (folder / f"{number}.json").write_text(json.dumps(counted))
    if tensors:
        save_file(tensors, folder / f"{number}.safetensors")


def buffer_bytes(end: GroupSender | GroupReceiver) -> int:
    """Return the bytes of an end's buffers."""
    return sum(slot.nbytes for slot in end._slots)


def messages_of(end: GroupSender | GroupReceiver, direction: str) -> list[int]:
    """Return the list to which the bytes of each message that an end sends or receives are added."""
    sizes: list[int] = []
    begin = getattr(end._member, direction)

    def counting(payload: torch.Tensor, peer: int) -> object:
        sizes.append(payload.nbytes)
        return begin(payload, peer)

    setattr(end._member, direction, counting)
    return sizes


def main() -> None:
    """Forks the ends, so that torch is imported once."""
    torch.set_num_threads(1)
    folder, fault = Path(sys.argv[1]), sys.argv[2]
    reading, writing = os.pipe()
    children = []
    for number in range(6):
        if (child := os.fork()) == 0:
            port = int(os.read(reading, 5))
            sizes = {"num_sources": 2, "num_engines": 2, "num_workers": 2}
            run(number, World(way="gloo", host="127.0.0.1", port=port, name="test", **sizes), folder, fault)
            os._exit(0)
        children.append(child)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # after the forks: it has threads
    os.write(writing, f"{store.port:05d}".encode() * 6)
    raise SystemExit(sum(os.waitpid(child, 0)[1] for child in children) > 0)


if __name__ == "__main__":
    main()
