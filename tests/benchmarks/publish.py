"""The publish in place, against two copies of the same bytes by memcpy; and the cost of the verification. Prints JSON.

    OMP_NUM_THREADS=2 python tests/benchmarks/publish.py [--rounds 7] [--bucket-mib 64] [--out FILE]

A trainer of one rank and one engine worker in this process hold tensors of SmolLM2-135M's shapes (random, bfloat16,
269 MB); sender and receiver run at once, in a thread each, through /dev/shm as in training. In every round, one after
the other: two memcpys (tensors to a buffer that is there, and on to other tensors), the publish, the check at both
ends. Ratios are of the medians, and so are the seconds; `load` is the machine's load average when it began and ended,
which holds this program's own. Left out: what only a live engine adds, the calls, the pause, packing the weights again
and probing the packs.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from gpu_models import SHAPES

from conversion.families import Model, model_from_config
from conversion.plan import plan
from conversion.tiles import ParallelLayout
from conversion.transfer.shared_memory import SHARED_MEMORY, SharedMemoryReceiver, SharedMemorySender, weight_file
from conversion.verify import Holdings, Verifier, held_parts, sent_parts


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measured(model: Model, rounds: int, bucket_bytes: int, folder: Path) -> dict[str, object]:
    dtype, layout = torch.bfloat16, ParallelLayout()
    load = [round(os.getloadavg()[0], 1)]
    shapes = model.megatron_shapes(layout, 0)
    trainer = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    worker = {name: torch.zeros(shape, dtype=dtype) for name, shape in model.vllm_shapes(1, 0).items()}
    between = {name: torch.zeros_like(tensor) for name, tensor in trainer.items()}
    beyond = {name: torch.zeros_like(tensor) for name, tensor in trainer.items()}
    way = plan(model.megatron_tiles(layout), model.vllm_tiles(1))
    sender = SharedMemorySender(way, 0, trainer, folder, dtype, bucket_bytes=bucket_bytes)
    receiver = SharedMemoryReceiver(way, 0, worker, folder, dtype, bucket_bytes=bucket_bytes)
    sent, arrived = Holdings(sent_parts(way, 0), trainer, dtype), Holdings(held_parts(way, 0), worker, dtype)
    verifier = Verifier(way)
    threads = ThreadPoolExecutor(1)

    def copies() -> None:
        for name, tensor in trainer.items():
            between[name].copy_(tensor)
        for name, tensor in between.items():
            beyond[name].copy_(tensor)

    def publish() -> None:
        sending = threads.submit(sender.send)
        receiver.receive()
        sending.result()

    def check() -> None:
        manifest = verifier.manifest(len(times["publish"]), {0: sent.digests()})
        assert verifier.first_mismatch(manifest, 0, arrived.digests()) is None

    parts: dict[str, Callable[[], object]] = {"two_copies": copies, "publish": publish, "check": check}
    times: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(rounds + 1):
        trainer["decoder.final_layernorm.weight"].normal_()
        for name, call in parts.items():
            times[name].append(seconds(call))
    median = {name: statistics.median(spent[1:]) for name, spent in times.items()}  # the first touches the pages
    figures: dict[str, object] = {
        "bytes": sender._schedule.total_bytes,
        "bucket_bytes": bucket_bytes,
        "held_bytes": weight_file(folder, 0).stat().st_size,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "load": [*load, round(os.getloadavg()[0], 1)],
        "seconds": {name: round(value, 4) for name, value in median.items()},
        "first_publish_seconds": round(times["publish"][0], 4),
        "publish_over_two_copies": round(median["publish"] / median["two_copies"], 2),
        "check_over_publish": round(median["check"] / median["publish"], 2),
    }
    sender.close()
    receiver.close()
    return figures


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--bucket-mib", type=float, nargs="+", default=[64])
    arguments.add_argument("--out", type=Path)
    chosen = arguments.parse_args()
    figures = []
    for mib in chosen.bucket_mib:
        with tempfile.TemporaryDirectory(prefix="astar-benchmark-", dir=SHARED_MEMORY) as folder:
            model = model_from_config(SHAPES["smollm2"])
            figures.append(measured(model, chosen.rounds, int(mib * 2**20), Path(folder)))
    text = json.dumps(figures, indent=2)
    print(text)
    if chosen.out:
        chosen.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
