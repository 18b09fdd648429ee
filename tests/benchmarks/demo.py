r"""Stage 1 and a training step of the demo, beside TRL's A2PO trainer and beside vLLM alone, one after the other.

    make demo                                                                  # once: model and prompts
    .venv/bin/uv pip install --target runs/trl --no-deps trl==1.16.0 datasets==5.2.0 accelerate==1.15.0 \
        multiprocess==0.70.19 pandas==3.1.1 xxhash==4.1.0 dill==0.4.1          # the peer
    .venv/bin/python tests/benchmarks/demo.py --trl runs/trl

All three do the same work: 64 prompts, 8 rollouts each in stage 1, at most 24 response tokens; one update of 64
sequences a step, for the demo's 12 steps. Each trainer computes in the type in which it learns: ours by `dtype: auto`,
TRL's in float32. Nothing else should run meanwhile. Writes the entry of this kind of machine in
tests/benchmarks/results/demo.json.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, closing
from pathlib import Path
from statistics import median
from typing import Any

import torch

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
        overrides = [f"run_dir={folder}", f"train.num_steps={steps}", "eval.interval=null"]
        cfg = config.load(ROOT / "configs/demo.yaml", overrides)
        tracker, start = Tracker(cfg.run_dir), time.perf_counter()
        inputs = prepare(cfg)
        fleet = stack.enter_context(Fleet(cfg, inputs.model, tracker))
        ready = time.perf_counter()
        sweep(cfg, inputs, fleet.engines, tracker)
        swept = time.perf_counter()
        train(cfg, inputs, stage_1(cfg, inputs), fleet, tracker)
        lines = read_metrics(folder)
        seconds = [line["seconds"] for line in lines]
        parts = ("generate", "score", "reference", "policy", "publish")
        return {
            "dtype": fleet.policy.dtype,
            "start_up": ready - start,
            "stage_1": swept - ready,
            "step": median(step["total"] for step in seconds),
            "step_parts": {part: median(step[part] for step in seconds) for part in parts},
            "driver_share": median(1 - sum(step[part] for part in parts) / step["total"] for step in seconds),
            "steps": [step["total"] for step in seconds],
            "rewards": [line["reward_mean"] for line in lines],
        }


def peer(trl: Path, steps: int) -> dict[str, Any]:
    """Stage 1 and the median step of TRL's A2PO trainer (fp32, its own settings on CPU), seconds."""
    command, env = [sys.executable, str(HERE / "trl_a2po.py"), str(steps)], os.environ | {"PYTHONPATH": str(trl)}
    done = subprocess.run(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    words = [line.split() for line in done.stdout.splitlines()]
    stage_1 = next(float(line[1]) for line in words if line[:1] == ["stage1"])
    seconds = [float(line[2]) for line in words if line[:1] == ["step"]]
    rewards = [float(line[2]) for line in words if line[:1] == ["reward"]]
    return {"dtype": "float32", "stage_1": stage_1, "step": median(seconds), "steps": seconds, "rewards": rewards}


def floor(dtype: str) -> dict[str, Any]:
    """The generation of stage 1 and of a step by vLLM alone, after a warm-up, seconds."""
    from plain_vllm import Plain

    from astar_megatron import config
    from astar_megatron.data.prompts import read_prompts

    cfg = config.load(ROOT / "configs/demo.yaml")
    with closing(Plain(cfg, read_prompts(cfg.data, cfg.model.path), dtype, samples=1)) as plain:
        plain.draw(1)
        seconds = {name: plain.draw(samples)["seconds"] for name, samples in (("stage_1", 8), ("generate", 1))}
    return {"dtype": dtype} | {name: round(spent, 1) for name, spent in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", type=Path, help="folder with trl; none: the peer is left out")
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    report = {"machine": machine(), "astar_megatron": ours(arguments.steps)}
    write(report)
    if arguments.trl:
        report["trl_a2po"] = peer(arguments.trl.resolve(), arguments.steps)
        report["ratios"] = {key: report["trl_a2po"][key] / report["astar_megatron"][key] for key in ("stage_1", "step")}
        write(report)
    report["vllm_alone"] = floor(report["astar_megatron"]["dtype"])
    write(report)
    print(json.dumps(report, indent=1))


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {flag} " in f"{cpu} "]
    return {"cores": os.cpu_count(), "flags": flags, "kind": platform.machine()}


def write(report: dict[str, Any]) -> None:
    """Keep what is measured so far, beside the entries of other kinds of machines: the parts take minutes each."""
    file = HERE / "results" / "demo.json"
    entries = json.loads(file.read_text()) if file.exists() else {}
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX2" and "avx512f" in report["machine"]["flags"]:
        capability = "AVX512 held to AVX2"  # by held_to_avx2/
    kind = f"{os.cpu_count()} cores, {capability}, {report['astar_megatron']['dtype']}"
    file.write_text(json.dumps(entries | {kind: report}, indent=1) + "\n")


if __name__ == "__main__":
    main()
