"""One policy rank alone: seconds a step, MFU and memory, so that a fusion that is lost is seen.

    PYTHONPATH=. python3 tests/benchmarks/gpu_rank.py [SHAPE ...] [--json FILE]

Random weights of Qwen2.5-1.5B's and Qwen3-0.6B's shape in bfloat16; reference, policy and optimiser on one device; 128
sequences of 128 + 1024 tokens a step in two mini-batches, packs of 16,384 tokens. The first step is not counted: it
compiles. `tiny` runs anywhere, to see that this program does.

Before the fusions the first shape took 7.8 s at an MFU of 0.24 on one H200, with them 3.85 s at 0.486. With Transformer
Engine an MFU below 0.35 there ends with status 1.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import gpu_machine

LEAST_MFU = {"1.5b": 0.35}
GIB = 1 << 30


def measured(shape: str, steps: int) -> dict[str, Any]:
    """Return what one rank says of `steps` steps after a first."""
    import torch
    from gpu_models import SHAPES, write_model

    from astar_megatron.algorithm.astar import AstarLoss
    from astar_megatron.config import OptimConfig, ParallelConfig
    from astar_megatron.model.options import PolicyOptions
    from astar_megatron.model.policy import PolicyRank
    from astar_megatron.types import RolloutBatch, StepOptions

    loss = AstarLoss(beta2=1e-3)

    count, prompt, response, tokens = (4, 8, 24, 64) if shape == "tiny" else (128, 128, 1024, 16384)
    generator = torch.Generator().manual_seed(0)

    def batch(version: int) -> RolloutBatch:
        ids = torch.randint(10, SHAPES[shape]["vocab_size"] - 10, (count, prompt + response), generator=generator)
        return RolloutBatch(
            token_ids=tuple(map(tuple, ids.tolist())),
            prompt_tokens=(prompt,) * count,
            columns={
                "reward": torch.rand(count, generator=generator, dtype=torch.float64).round(),
                "v_star": torch.full((count,), 0.5, dtype=torch.float64),
            },
            version=version,
        )

    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()  # of the shape before
    options = StepOptions(temperature=1.0, mini_batch_size=count // 2, micro_batch_tokens=tokens)
    with tempfile.TemporaryDirectory() as folder:
        policy = PolicyOptions(
            model_path=str(write_model(Path(folder), shape)),
            dtype="bfloat16",
            parallel=ParallelConfig(),
            optim=OptimConfig(lr=1e-6),
            seed=0,
            optimizer_steps=2 * (steps + 1),
        )
        rank = PolicyRank(0, policy)
        steps_taken = []
        try:
            words = rank.start("127.0.0.1", rank.listen("127.0.0.1"))
            for version in range(steps + 1):
                start = time.perf_counter()
                stats = rank.step(
                    batch(version), loss, options
                )  # ends with the optimiser's norm, so nothing is under way
                assert stats is not None
                steps_taken.append((time.perf_counter() - start, stats))
        finally:
            rank.close()
    first, later = steps_taken[0][0], steps_taken[1:]
    return {
        "shape": shape,
        "runs on": words,
        "transformer_engine": rank.backend.uses_transformer_engine,
        "first step, s": round(first, 2),
        "step, s": round(median(seconds for seconds, _ in later), 3),
        "reference, s": round(median(stats.seconds["reference"] for _, stats in later), 3),
        "policy, s": round(median(stats.seconds["policy"] for _, stats in later), 3),
        "tokens/s": round(median(stats.tokens_per_second for _, stats in later)),
        "mfu": None if later[0][1].mfu is None else round(median(stats.mfu or 0.0 for _, stats in later), 3),
        "peak GiB": round(max(stats.peak_memory_bytes[0] for _, stats in later) / GIB, 1),
    }


def lost(report: dict[str, Any]) -> str | None:
    """Return in words that a step is slower than the fusions make it."""
    least = LEAST_MFU.get(report["shape"], 0.0)
    if not report["transformer_engine"] or report["mfu"] is None or report["mfu"] >= least:
        return None
    return (
        f"gpu-check: an MFU of {report['mfu']} at the shape {report['shape']}, expected at least {least}: is a fusion "
        "of model/backend.py lost, or was something else running?"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=["1.5b", "0.6b"])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    missing = [name for name in ("megatron", "pydantic", "safetensors", "yaml") if find_spec(name) is None]
    if missing:
        print(f"gpu-check: no {' and no '.join(missing)} here: the table of a policy rank is left out")
        return
    if arguments.shapes != ["tiny"] and (problem := gpu_machine.problem()) is not None:
        sys.exit(problem)
    from astar_megatron.model.backend import environment

    gpus = [] if arguments.shapes == ["tiny"] else os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[:1]
    os.environ |= environment(gpus=gpus, threads=os.cpu_count() or 1, num_nodes=1, dtype="bfloat16")
    reports = []
    for shape in arguments.shapes:
        reports.append(measured(shape, arguments.steps))
        for name, figure in reports[-1].items():
            print(f"{name:>20}  {figure}")
        print(flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(reports, indent=1) + "\n")
    if problems := list(filter(None, map(lost, reports))):
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
