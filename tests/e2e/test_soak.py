"""Half an hour of training, a fault every half a minute: the same numbers, no growth, nothing left (`make soak`)."""

import os
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import samples
from driver_process import Driver, driver
from random_kills import processes_of, write_run

from astar_megatron.cluster.processes import process_tree
from astar_megatron.cluster.signals import RESUME
from astar_megatron.run.tracking import read_metrics

SECONDS = float(os.environ.get("ASTAR_SOAK_SECONDS", 0.0))
FAULT_SECONDS = 30.0
STARTING_SECONDS = 120.0  # of a rank that was killed at the end of the first half
MOST_GROWTH = 0.02  # in the last half
# Kinds of faults. One engine is spared throughout and the rank in the last half: they must not grow either.
FIRST_HALF = [
    ("rank", signal.SIGKILL),
    ("engine", signal.SIGKILL),
    ("engine's core", signal.SIGSTOP),
    ("engine's core", signal.SIGKILL),
]
LAST_HALF = [("engine", signal.SIGKILL), ("engine's core", signal.SIGSTOP), ("engine's core", signal.SIGKILL)]

type Memory = dict[str, list[tuple[float, int]]]  # process: (seconds since the start, resident bytes)


@pytest.mark.slow
@pytest.mark.skipif(not SECONDS, reason="takes an hour: `make soak` (ASTAR_SOAK_SECONDS)")
@pytest.mark.timeout(4 * SECONDS + 600)
def test_a_run_under_faults_keeps_its_numbers_does_not_grow_and_leaves_nothing(
    tied_llama: Path, tmp_path: Path
) -> None:
    many: dict[str, Any] = {
        "train": {"num_steps": 100_000},
        "checkpoint": {"keep": 2},
        "rollout": {"heartbeat_seconds": 30.0, "keep": 3},
        "eval": {"interval": 20},
    }
    soaked = write_run(tmp_path, tied_llama, "soaked", **many)
    with driver("train", "--config", str(soaked)) as process:
        process.wait_for(lambda output: len(read_metrics(soaked.with_suffix(""))) >= 2)
        faults, memory = soak(process)
        assert process.end(signal.SIGTERM) == RESUME  # and nothing is left
    lines = read_metrics(soaked.with_suffix(""))
    growth = {name: growth_of(values) for name, values in memory.items()}
    result = {
        "seconds": SECONDS,
        "faults": dict(Counter(faults)),
        "steps": len(lines),
        "engines_replaced": sum(line["engines_replaced"] for line in lines),
        "growth_in_the_last_half": growth,
        "mebibytes_in_the_end": {name: round(values[-1][1] / 2**20) for name, values in memory.items()},
    }
    samples.keep_result("soak", "run", result)  # now too: what follows may take as long and fail
    whole = write_run(tmp_path, tied_llama, "whole", **many)
    with driver("train", "--config", str(whole)) as process:
        process.wait_for(lambda output: len(read_metrics(whole.with_suffix(""))) >= len(lines))
        assert process.end(signal.SIGTERM) == RESUME
    others = read_metrics(whole.with_suffix(""))[: len(lines)]
    result["differing_steps"] = sum(
        line | samples.MEASURED_AFTER_DEATHS != other | samples.MEASURED_AFTER_DEATHS
        for line, other in zip(lines, others, strict=True)
    )
    samples.keep_result("soak", "run", result)
    assert result["differing_steps"] == 0
    assert max(growth.values()) < MOST_GROWTH, result
    assert len(faults) > SECONDS / FAULT_SECONDS / 2


def soak(process: Driver) -> tuple[list[str], Memory]:
    """Let faults happen for SECONDS; return them, and the memory of what lives through the last half."""
    chance, begun, faults = random.Random(1), time.monotonic(), []
    engine = processes_of("engine", process)[0]
    (core,) = set(processes_of("engine's core", process)) & process_tree(engine)
    spared = {"engine": engine, "engine's core": core}
    memory: Memory = {}
    next_fault = FAULT_SECONDS
    while (now := time.monotonic() - begun) < SECONDS:
        assert process.process.poll() is None, process.output()
        kinds = LAST_HALF if now >= SECONDS / 2 - 3 * FAULT_SECONDS else FIRST_HALF  # a new rank fills its caches first
        if now >= SECONDS / 2:
            pids = {"driver": process.process.pid, **spared}
            pids |= {name: pid for name in ("rank", "raylet") for pid in processes_of(name, process)}
            assert len(pids) == 5 or now < SECONDS / 2 + STARTING_SECONDS, (pids, process.output())
            for name, pid in pids.items():
                memory.setdefault(name, []).append((now, resident_bytes(pid)))
        if now >= next_fault and all_are_there(process.output()):
            victim, number = chance.choice(kinds)
            if pids := set(processes_of(victim, process)) - set(spared.values()):
                os.kill(min(pids), number)
                faults.append(f"{victim}, {number.name}")
                next_fault = now + chance.uniform(0.5, 1.5) * FAULT_SECONDS
        time.sleep(2.0)
    return faults, memory


def all_are_there(output: str) -> bool:
    """Whether no engine is being replaced, and the last has drawn: one that ends thrice before it does is given up."""
    since = output.rpartition(": replaced in ")[2]
    are_there = output.count("; it is being replaced") == output.count(": replaced in ")
    return are_there and since.count("\nstep ") >= 2


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth_of(values: list[tuple[float, int]]) -> float:
    """By how much of its mean the memory has grown over the time, by a line through the values."""
    seconds, sizes = np.array(values).T
    slope, _ = np.polyfit(seconds, sizes, 1)
    return round(slope * (seconds[-1] - seconds[0]) / sizes.mean(), 4)
