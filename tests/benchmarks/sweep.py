"""The sweep through the pool against one plain vLLM process on the same prompts and cores, in turns of one run.

    python tests/benchmarks/sweep.py [--samples 8] [--turns 2]

Prompts, model and settings are the demo's (run `make demo` once). `plain` is vLLM's own LLM.generate with n samples a
prompt, as one would call it; `plain, same requests` has, as the sweep, a seed and a log-prob for each response, and so
draws the very same tokens. Each side has answered once before it is timed. Writes results/sweep.json.
"""

import argparse
import json
import os
import tempfile
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from demo import machine
from plain_vllm import Plain

from astar_megatron import config
from astar_megatron.data.arithmetic import one_digit_additions, write_jsonl
from astar_megatron.model.compute_type import compute_type
from astar_megatron.run.fleet import engines_of
from astar_megatron.run.prepare import Inputs, prepare
from astar_megatron.run.tracking import Tracker
from astar_megatron.sweep import sweep

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def ours(cfg: config.RunConfig, inputs: Inputs, engines: Any, samples: int, folder: Path) -> dict[str, float]:
    """One whole sweep into an empty table."""
    cfg = cfg.model_copy(update={"sweep": config.SweepConfig(table=str(folder), num_samples=samples)})
    start = time.perf_counter()
    table = sweep(cfg, inputs, engines, Tracker(folder.parent))
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "tokens": table.summary().response_tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--turns", type=int, default=2)
    arguments = parser.parse_args()
    cfg = config.load(ROOT / "configs/demo.yaml", [f"cluster.threads={os.cpu_count()}"])
    write_jsonl(cfg.data.path, one_digit_additions())
    inputs = prepare(cfg)
    turns: dict[str, list[dict[str, float]]] = {"pool": [], "plain": [], "plain, same requests": []}
    dtype = compute_type(cfg.model.dtype, num_gpus=0)[0]
    plain = Plain(cfg, inputs.prompts, dtype, arguments.samples)
    runs = tempfile.TemporaryDirectory(dir=ROOT / "runs")
    with closing(plain), runs as name, engines_of(cfg, Tracker(name)) as engines:
        few = replace(inputs, prompts=inputs.prompts[:8])
        ours(cfg, few, engines, 1, Path(name) / "warm-up" / "v_star")
        plain.draw(1)
        for turn in range(arguments.turns):
            turns["pool"].append(ours(cfg, inputs, engines, arguments.samples, Path(name) / str(turn) / "v_star"))
            turns["plain, same requests"].append(plain.draw("same"))
            write(turns)
            turns["plain"].append(plain.draw(arguments.samples))
            write(turns)
            assert turns["pool"][turn]["tokens"] == turns["plain, same requests"][turn]["tokens"], turns


def write(turns: dict[str, list[dict[str, float]]]) -> None:
    """Keep and show what is measured so far."""
    speed = {name: [turn["tokens"] / turn["seconds"] for turn in taken] for name, taken in turns.items() if taken}
    of_pool = median(speed["pool"])
    result = {
        "machine": machine() | {"load": os.getloadavg()},
        "tokens_per_second": speed,
        "pool_as_share_of": {name: of_pool / median(each) for name, each in speed.items() if name != "pool"},
    }
    (HERE / "results" / "sweep.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
