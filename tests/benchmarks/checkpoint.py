"""Checkpoints of SmolLM2-135M's shape: the optimiser's state in pieces, against Megatron's gather of it. Prints JSON.

    OMP_NUM_THREADS=1 PYTHONPATH=. python tests/benchmarks/checkpoint.py [--rounds 3] [--out FILE]

One rank, and two that share the optimiser (`data: 2`), in bfloat16 over gloo, save once and load: new processes a round
and way, as memory that was freed is not always given back.
`begin` is how long training waits for a save, `write` what a thread does after that beside it, `load` the way back;
`save_gib` and `load_gib` are what the ranks' processes take on top, at their peak and together. Seconds are those of
the slowest rank, and medians; `ratio` is Megatron's over ours. Megatron's is as it comes, and warns: where a tied head
is a bucket by itself it leaves the padding between buckets out, and has the rest of a stage in wrong places.
"""

import argparse
import json
import multiprocessing
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from gpu_models import write_model

GIB = 1 << 30
WAYS = ("megatron", "ours")
FIGURES = ("begin", "write", "load", "save_gib", "load_gib")


@contextmanager
def memory_on_top(figures: dict[str, float], name: str) -> Iterator[None]:
    """Note by how much the resident memory of this process grows in the body, at its peak."""

    def kilobytes(key: str) -> int:
        return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = kilobytes("VmRSS")
    yield
    figures[name] = (kilobytes("VmHWM") - before) * 1024 / GIB


def states(policy: Any, way: str, *, is_loading: bool) -> dict[str, Any]:
    """Return the sharded state of the policy's weights and optimiser."""
    from megatron.core import parallel_state

    from astar_megatron.model import checkpoint

    if way == "ours":
        return checkpoint._state(policy._learning, loading=is_loading)
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    model = policy._learning.chunks[0].sharded_state_dict(metadata=metadata)
    optimizer = policy._learning.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
    return {"model": model, "optimizer": optimizer, "schedule": policy._learning.schedule.state_dict()}


def save(policy: Any, way: str, folder: Path, wait: Callable[[], object]) -> dict[str, float]:
    from astar_megatron.model.saving import Saving

    figures: dict[str, float] = {}
    with memory_on_top(figures, "save_gib"):
        start = time.perf_counter()
        saving = Saving(folder, states(policy, way, is_loading=False), policy._writer)
        figures["begin"] = time.perf_counter() - start
        saving.state(wait=True)
        figures["write"] = time.perf_counter() - start - figures["begin"]
    wait()
    saving.finish(Path(policy._options.model_path))
    return figures


def load(policy: Any, way: str, folder: Path) -> dict[str, float]:
    from megatron.core import dist_checkpointing

    from astar_megatron.model import optimizer_state

    figures: dict[str, float] = {}
    (optimizer,) = policy._learning.optimizer.chained_optimizers
    with memory_on_top(figures, "load_gib"):
        start = time.perf_counter()
        loaded: Any = dist_checkpointing.load(states(policy, way, is_loading=True), str(folder))
        pieces = loaded["optimizer"]["param_state"]
        policy._learning.chunks[0].load_state_dict(loaded["model"])
        if way == "ours":
            optimizer_state.take(optimizer, pieces)
        else:
            optimizer.load_parameter_state_from_fully_reshardable(pieces)
        figures["load"] = time.perf_counter() - start
    return figures


def one_rank(rank: int, ranks: int, way: str, model: str, folder: str, pipe: Any) -> None:
    """Send what this rank measured."""
    from megatron.core import parallel_state
    from torch import distributed as dist

    from astar_megatron.config import OptimConfig, ParallelConfig
    from astar_megatron.model.options import PolicyOptions
    from astar_megatron.model.policy import PolicyRank

    options = PolicyOptions(
        model_path=model,
        dtype="bfloat16",
        parallel=ParallelConfig(data=ranks),
        optim=OptimConfig(lr=1e-6),
        seed=0,
        optimizer_steps=1,
    )
    policy = PolicyRank(rank, options)
    if rank == 0:
        pipe.send(policy.listen("127.0.0.1"))
    policy.start("127.0.0.1", pipe.recv())
    assert parallel_state.get_data_parallel_world_size() == ranks
    dist.barrier()
    figures = save(policy, way, Path(folder), dist.barrier)
    dist.barrier()
    pipe.send(figures | load(policy, way, Path(folder)))
    dist.barrier()
    policy.close()


def measured(ranks: int, way: str, model: Path) -> dict[str, float]:
    """Return what all ranks together measured in a save and a load."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir=model.parent) as folder:
        pipes, processes = [], []
        for rank in range(ranks):
            here, there = context.Pipe()
            process = context.Process(target=one_rank, args=(rank, ranks, way, str(model), folder, there))
            process.start()
            pipes.append(here)
            processes.append(process)
        port = pipes[0].recv()
        for pipe in pipes:
            pipe.send(port)
        answers = [pipe.recv() for pipe in pipes]
        for process in processes:
            process.join()
    return {name: (sum if name.endswith("gib") else max)(answer[name] for answer in answers) for name in FIGURES}


def table(ranks: int, rounds: int, model: Path) -> dict[str, dict[str, float]]:
    rows = [{way: measured(ranks, way, model) for way in WAYS} for _ in range(rounds)]
    medians = {way: {name: statistics.median(row[way][name] for row in rows) for name in FIGURES} for way in WAYS}
    medians["ratio"] = {name: medians["megatron"][name] / medians["ours"][name] for name in FIGURES}
    return {way: {name: round(figure, 2) for name, figure in figures.items()} for way, figures in medians.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shape", default="smollm2")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "TORCHDYNAMO_DISABLE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder) / "model", arguments.shape)
        tables = {f"data={ranks}": table(ranks, arguments.rounds, model) for ranks in (1, 2)}
    result = {"shape": arguments.shape, "rounds": arguments.rounds, "torch": torch.__version__, **tables}
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
