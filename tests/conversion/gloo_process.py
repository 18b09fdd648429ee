"""A program: all ends of a gloo transfer, a process each.

    python gloo_process.py FOLDER {none|late}

Ranks 0 and 1 are the trainer's (tensor parallel), 2 and 3 the workers of engine 0, 4 and 5 those of engine 1. Receivers
write what they then hold to FOLDER, whoever fails its error. With "late" rank 1 never sends.
"""

import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tiny_models import config, empty_world, random_weights, reference_world

from conversion.families import model_from_config
from conversion.plan import plan
from conversion.tiles import ParallelLayout
from conversion.transfer import TransferError
from conversion.transfer.gloo import GlooReceiver, GlooSender

MODEL = model_from_config(config("qwen2"))
LAYOUT = ParallelLayout(tensor=2)
BUCKET_BYTES = 3000


def run(rank: int, folder: Path, fault: str) -> None:
    store = dist.FileStore(str(folder / "store"), 6)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=6, timeout=timedelta(seconds=60))
    weights = plan(MODEL.megatron_tiles(LAYOUT), MODEL.vllm_tiles(2))
    seconds = 60 if fault == "none" else 1
    if rank < 2:
        shapes = {r: MODEL.megatron_shapes(LAYOUT, r) for r in range(2)}
        world = reference_world(MODEL.megatron_tiles(LAYOUT), random_weights(MODEL), empty_world(shapes))
        peers = [{0: 2, 1: 3}, {0: 4, 1: 5}]
        sender = GlooSender(weights, rank, world[rank], peers, bucket_bytes=BUCKET_BYTES, timeout_seconds=seconds)
        assert sender.held_bytes <= 2 * BUCKET_BYTES < sender.total_bytes
        carry = [sender.send] if not (fault == "late" and rank == 1) else [lambda version: time.sleep(1.5)]
    else:
        tensors = empty_world({0: MODEL.vllm_shapes(2, rank % 2)})[0]
        receiver = GlooReceiver(
            weights, rank % 2, tensors, {0: 0, 1: 1}, bucket_bytes=BUCKET_BYTES, timeout_seconds=seconds
        )
        assert receiver.held_bytes <= 2 * BUCKET_BYTES
        carry = [receiver.receive]
    try:
        for version in (3, 4):
            carry[0](version)
    except TransferError as error:
        (folder / f"{rank}.error").write_text(str(error))
        return
    if rank >= 2:
        save_file(tensors, folder / f"{rank}.safetensors")
    if fault == "none":  # else some have left
        dist.barrier()
        dist.destroy_process_group()


def main() -> None:
    """Forks the ranks, so that torch is imported once."""
    torch.set_num_threads(1)
    children = []
    for rank in range(6):
        if (child := os.fork()) == 0:
            run(rank, Path(sys.argv[1]), sys.argv[2])
            os._exit(0)
        children.append(child)
    raise SystemExit(sum(os.waitpid(child, 0)[1] for child in children) > 0)


if __name__ == "__main__":
    main()
