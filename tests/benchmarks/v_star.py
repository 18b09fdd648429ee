"""A V* table of 1 million prompts x 8 rows: opening, what it takes, what adding a shard costs at each size.

    python tests/benchmarks/v_star.py FOLDER [--prompts 1000000] [--seconds 200]

Fills FOLDER with shards of 2048 rows, as many as a sweep of four engines writes at once, for so many seconds; run
again it goes on, and in the end measures and writes results/v_star.json. Only what is timed goes through `append`: the
rest is written from columns, since making 8 million rollouts would take most of the time.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
from demo import machine

from astar_megatron.data import shards
from astar_megatron.data.contract import Contract
from astar_megatron.data.v_star import VStarTable
from astar_megatron.types import Prompt, Rollout

HERE = Path(__file__).resolve().parent
ROWS, SAMPLES, TOKENS, REPEATS = 2048, 8, 20, 50
CONTRACT = Contract(
    model_digest="m" * 64,
    tokenizer_digest="t" * 64,
    template_digest="c" * 64,
    temperature=1.0,
    top_p=1.0,
    max_prompt_tokens=256,
    max_response_tokens=1024,
    stop_token_ids=(2,),
    reward="last_number/1",
)
OPEN = """
import json, resource, sys, time
from astar_megatron.data.v_star import VStarTable
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
imports = peak()
start, start_cpu = time.perf_counter(), time.process_time()
table = VStarTable.open(sys.argv[1], None)
table.lacking([], 8)
opened, opened_cpu, opened_gib = time.perf_counter(), time.process_time(), peak()
estimates = table.estimate(0.5)
print(json.dumps({
    "open_seconds": opened - start,
    "open_cpu_seconds": opened_cpu - start_cpu,
    "estimate_seconds": time.perf_counter() - opened,
    "prompts": len(estimates.uids),
    "rows": int(estimates.samples.sum()),
    "imports_gib": imports,
    "peak_gib_when_open": opened_gib,
    "peak_gib_with_estimate": peak(),
}))
"""


def shard(number: int) -> list[Rollout]:
    """The rollouts of 256 prompts, as `columns` has their rows."""
    return [
        Rollout(
            prompt=Prompt(uid=row["uid"], token_ids=(1,), text="", answer=""),
            sample=row["sample"],
            seed=row["seed"],
            token_ids=tuple(row["response"]),
            text="",
            truncated=False,
            token_logprobs=(row["logprob"], *(0.0,) * (TOKENS - 1)),
            first_version=0,
            last_version=0,
            reward=row["reward"],
        )
        for row in columns(number).to_pylist()
    ]


def columns(number: int) -> pa.Table:
    """The rows of 256 prompts."""
    i = np.repeat(np.arange(ROWS // SAMPLES) + number * (ROWS // SAMPLES), SAMPLES)
    sample = np.tile(np.arange(SAMPLES), ROWS // SAMPLES)
    tokens = (i[:, None] % 97 + np.arange(TOKENS)).astype(np.int32)
    lists = pa.ListArray.from_arrays(np.arange(ROWS + 1, dtype=np.int32) * TOKENS, tokens.reshape(-1))
    values = {
        "uid": pa.array([uid(int(prompt)) for prompt in i]),
        "sample": sample.astype(np.uint32),
        "reward": ((i * 31 + sample * 17) % 5 < i % 6).astype(np.float64),
        "response": lists,
        "response_tokens": np.full(ROWS, TOKENS, np.int32),
        "finish_reason": ["stop"] * ROWS,
        "seed": i * SAMPLES + sample,
        "logprob": np.full(ROWS, -1.5),
        "text": [None] * ROWS,
    }
    return pa.table(values, schema=shards._SCHEMA)


def uid(i: int) -> str:
    return f"{(i * 0x9E3779B97F4A7C15) % 2**128:032x}"


def opened(folder: Path) -> dict[str, float]:
    """Open and estimate in a process of its own, which says what it took."""
    command = [sys.executable, "-c", OPEN, str(folder)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=HERE.parents[1]).stdout)


def append_milliseconds(table: VStarTable, number: int) -> dict[str, float]:
    """Of REPEATS shards, which are removed again: the next run measures the same table."""
    seconds, before = [], set(table.folder.iterdir())
    for rollouts in [shard(number + i) for i in range(REPEATS)]:
        start, start_cpu = time.perf_counter(), time.process_time()
        table.append(rollouts)
        seconds.append((time.perf_counter() - start, time.process_time() - start_cpu))
    for path in {*table.folder.iterdir()} - before:
        path.unlink()
    return {
        "median": 1e3 * median(wall for wall, _ in seconds),
        "median of the processor's time": 1e3 * median(cpu for _, cpu in seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompts", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=200)
    arguments = parser.parse_args()
    wanted, folder = arguments.prompts * SAMPLES // ROWS, arguments.folder / "v_star"
    table, end = VStarTable.create_or_open(folder, CONTRACT), time.monotonic() + arguments.seconds
    for number in range(len(list(folder.glob("shard-*"))), wanted):
        if time.monotonic() > end:
            print(f"{number} of {wanted} shards; run this again")
            return
        rows = columns(number)
        table._add(shards.write_rows(folder, number + 1, rows), rows.select(list(shards.COLUMNS)))
    empty = VStarTable.create_or_open(arguments.folder / "empty", CONTRACT)
    report: dict[str, Any] = {
        "machine": machine() | {"load": os.getloadavg()[0]},
        "shards": wanted,
        "rows_a_shard": ROWS,
        "bytes": sum(path.stat().st_size for path in folder.iterdir() if path.is_file()),
        "opened": opened(folder),
        "append_milliseconds": {
            "to none": append_milliseconds(empty, 0),
            "to all": append_milliseconds(table, wanted),
        },
    }
    (HERE / "results" / "v_star.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
