"""The sweep through the pool against one plain vLLM process on the same prompts and cores, in turns of one run.

    python tests/benchmarks/sweep.py [--samples 8] [--turns 2]

Prompts, model and settings are the demo's (run `make demo` once). `plain` is vLLM's own LLM.generate with n samples a
prompt, as one would call it; `plain, same requests` has, as the sweep, a seed and a log-prob for each response, and so
draws the very same tokens. Each side has answered once before it is timed. Writes results/sweep.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from demo import machine

from astar_megatron import config
from astar_megatron.data.arithmetic import one_digit_additions, write_jsonl
from astar_megatron.model.backend import resolve_dtype
from astar_megatron.rollout.requests import seed_of
from astar_megatron.run.fleet import engines_of
from astar_megatron.run.prepare import Inputs, prepare
from astar_megatron.run.tracking import Tracker
from astar_megatron.sweep import sweep

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


class Plain:
    """A process of plain vLLM, which loads at once and draws when told."""

    def __init__(self, cfg: config.RunConfig, inputs: Inputs, dtype: str, samples: int) -> None:
        env = os.environ | {"OMP_NUM_THREADS": str(os.cpu_count()), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(HERE / "plain_vllm.py")]
        self._process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        work = [(p.token_ids, [seed_of(cfg.seed, "sweep", p.uid, n) for n in range(samples)]) for p in inputs.prompts]
        self._tell({"model": cfg.model.path, "dtype": dtype, "limits": [cfg.max_tokens, cfg.rollout.max_num_seqs]})
        self._tell({"work": work, "max_tokens": cfg.sampling.max_response_tokens})

    def _tell(self, command: Any) -> None:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()

    def draw(self, command: str) -> dict[str, float]:
        self._tell(command)
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith("plain "):
                return json.loads(line.removeprefix("plain "))
        raise RuntimeError("plain vLLM ended")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


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
    found: dict[str, list[dict[str, float]]] = {"pool": [], "plain": [], "plain, same requests": []}
    dtype = str(resolve_dtype(cfg.model.dtype, 0)[0]).removeprefix("torch.")
    plain = Plain(cfg, inputs, dtype, arguments.samples)
    runs = tempfile.TemporaryDirectory(dir=ROOT / "runs")
    with closing(plain), runs as name, engines_of(cfg, Tracker(name)) as engines:
        few = replace(inputs, prompts=inputs.prompts[:8])
        ours(cfg, few, engines, 1, Path(name) / "warm-up" / "v_star")
        plain.draw("warm-up")
        for turn in range(arguments.turns):
            found["pool"].append(ours(cfg, inputs, engines, arguments.samples, Path(name) / str(turn) / "v_star"))
            found["plain, same requests"].append(plain.draw("same"))
            write(found)
            found["plain"].append(plain.draw("n"))
            write(found)
            assert found["pool"][turn]["tokens"] == found["plain, same requests"][turn]["tokens"], found


def write(found: dict[str, list[dict[str, float]]]) -> None:
    """Keep and show what is measured so far."""
    speed = {name: [turn["tokens"] / turn["seconds"] for turn in turns] for name, turns in found.items() if turns}
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
