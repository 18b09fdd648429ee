r"""Stage 1 and a training step of the demo, beside TRL's A2PO trainer and beside vLLM alone, one after the other.

    make demo                                                                  # once: model and prompts
    .venv/bin/uv pip install --target runs/trl --no-deps trl==1.16.0 datasets==5.2.0 accelerate==1.15.0 \
        multiprocess==0.70.19 pandas==3.1.1 xxhash==4.1.0 dill==0.4.1          # the peer
    .venv/bin/python tests/benchmarks/demo.py --trl runs/trl --steps 4 [--trl-steps 1]

All three do the same work: 64 prompts, 8 rollouts each in stage 1, at most 24 response tokens; one update of 64
sequences a step. Nothing else should run meanwhile. Writes tests/benchmarks/results/demo.json.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def ours(steps: int) -> dict[str, Any]:
    """Start-up, stage 1 and the median step of astar-megatron, seconds."""
    from astar_megatron import config
    from astar_megatron.run.fleet import Fleet
    from astar_megatron.run.prepare import prepare
    from astar_megatron.run.tracking import Tracker, read_metrics
    from astar_megatron.run.training import stage_1
    from astar_megatron.sweep import sweep
    from astar_megatron.train import train

    with tempfile.TemporaryDirectory(dir=ROOT / "runs") as folder, ExitStack() as stack:
        cfg = config.load(ROOT / "configs/demo.yaml", [f"run_dir={folder}", f"train.num_steps={steps}"])
        tracker, start = Tracker(cfg.run_dir), time.perf_counter()
        inputs = prepare(cfg)
        fleet = stack.enter_context(Fleet(cfg, inputs.model, tracker))
        ready = time.perf_counter()
        sweep(cfg, inputs, fleet.engines, tracker)
        swept = time.perf_counter()
        train(cfg, inputs, stage_1(cfg, inputs), fleet, tracker)
        seconds = [line["seconds"] for line in read_metrics(folder)]
        parts = ("generate", "score", "reference", "policy", "publish")
        return {
            "dtype": fleet.policy.dtype,
            "start_up": ready - start,
            "stage_1": swept - ready,
            "step": median(one["total"] for one in seconds),
            "step_parts": {part: median(one[part] for one in seconds) for part in parts},
            "driver_share": median(1 - sum(one[part] for part in parts) / one["total"] for one in seconds),
            "steps": [one["total"] for one in seconds],
        }


def peer(trl: Path, steps: int) -> dict[str, Any]:
    """Stage 1 and the median step of TRL's A2PO trainer (fp32, its own settings on CPU), seconds."""
    lines = _run([str(HERE / "trl_a2po.py"), str(steps)], PYTHONPATH=str(trl))
    stage_1 = next(float(line.split()[1]) for line in lines if line.startswith("stage1"))
    return {"dtype": "float32", "stage_1": stage_1, "step": median(_step(line) for line in lines if "step " in line)}


def floor(dtype: str) -> dict[str, Any]:
    """The generation of stage 1 and of a step by vLLM alone, in-process, after a warm-up, seconds."""
    lines = [line.split() for line in _run([str(HERE / "vllm_floor.py"), dtype])]
    return {"dtype": dtype} | {name: float(seconds) for _, name, seconds in lines if name != "warm-up"}


def _step(line: str) -> float:
    return float(line.split()[2])


def _run(arguments: list[str], **env: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, *arguments], env=os.environ | env, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    return [line for line in done.stdout.splitlines() if line.startswith(("stage1", "step ", "floor"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", type=Path, help="folder with trl; none: the peer is left out")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--trl-steps", type=int, default=1)
    arguments = parser.parse_args()
    found: dict[str, Any] = {"machine": machine(), "astar_megatron": ours(arguments.steps)}
    write(found)
    if arguments.trl:
        found["trl_a2po"] = peer(arguments.trl.resolve(), arguments.trl_steps)
        found["ratios"] = {key: found["trl_a2po"][key] / found["astar_megatron"][key] for key in ("stage_1", "step")}
        write(found)
    found["vllm_alone"] = floor(found["astar_megatron"]["dtype"])
    write(found)
    print(json.dumps(found, indent=1))


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {flag} " in f"{cpu} "]
    return {"cores": os.cpu_count(), "flags": flags, "kind": platform.machine()}


def write(found: dict[str, Any]) -> None:
    """Keep what is measured so far: the parts take minutes each."""
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "demo.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
