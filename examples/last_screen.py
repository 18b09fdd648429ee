"""What the demo shows in the end: what training changed, read from the run's folder, and what to look at next."""

import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from astar_megatron.run import scores
from astar_megatron.run.spending import Cost
from astar_megatron.run.tracking import METRICS_FILE, read_metrics


def before_and_after(run_dir: Path, curve: Path, export_dir: Path) -> list[tuple[str, str]]:
    """Return names and values of a finished run; of evaluations (`eval.interval`), the first and the last."""
    steps = read_metrics(run_dir)
    seconds = [Cost.of_step(step).seconds for step in steps]
    length = len(scores.name_of_step(0))
    evaluations = sorted({path.name[:length] for path in run_dir.glob("eval_step_*.jsonl")})
    ends = evaluations[:1] + evaluations[1:][-1:]
    first, last = steps[0], steps[-1]
    rewards = [f"{step['reward_mean']:.2f} (step {step['step']})" for step in (first, last)]
    return [
        *([("right answers, greedy", " -> ".join(_right(run_dir, name) for name in ends))] if ends else []),
        ("mean reward, sampled", " -> ".join(rewards)),
        ("seconds a step", f"{sum(seconds) / len(seconds):.1f}"),
        ("the rewards' curve", str(curve)),
        ("metrics, a line a step", str(run_dir / METRICS_FILE)),
        *([("every answer", ", ".join(f"{run_dir}/{name}*.jsonl" for name in ends))] if ends else []),
        ("exported model", str(export_dir)),
    ]


def next_commands(config_file: str, overrides: Sequence[str], num_steps: int) -> list[str]:
    """Return lines: commands of `astar` for a run of this file and these overrides that has taken `num_steps`."""
    run = ["--config", config_file, *(word for override in overrides for word in ("--set", override))]
    commands = [
        (["sweep", *run, "--inspect"], "what stage 1 found, prompt by prompt"),
        (["train", *run, "--set", f"train.num_steps={2 * num_steps}"], "goes on from the last checkpoint"),
        (["eval", *run], "evaluates the export"),
        (["compare", *run, "--methods", "astar,grpo", "--budget", "tokens=15000"], "A*PO beside GRPO, at equal cost"),
    ]
    lines = [f".venv/bin/astar {shlex.join(words)}" for words, _ in commands]
    width = max(map(len, lines))
    return [f"{line:<{width}}     # {meaning}" for line, (_, meaning) in zip(lines, commands, strict=True)]


def plot_rewards(run_dir: Path, baseline: float) -> Path:
    """Draw mean reward by step to `<run_dir>/reward.png` and return its path; `baseline` is the reference's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read_metrics(run_dir)
    figure, axes = pyplot.subplots(figsize=(7, 3.6), dpi=120)
    axes.plot(
        [line["step"] for line in lines],
        [line.get("reward_mean", math.nan) for line in lines],
        marker="o",
        color="#2a6f97",
    )
    axes.axhline(baseline, linestyle="--", color="#888888", label=f"reference, {baseline:.2f}")
    axes.legend(loc="lower right", frameon=False)
    axes.set(xlabel="step", ylabel="mean reward", ylim=(0, 1))
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path = run_dir / "reward.png"
    figure.savefig(path)
    pyplot.close(figure)
    return path


def _right(run_dir: Path, name: str) -> str:
    """Return how many of an evaluation's greedy responses have the full reward."""
    files = sorted(run_dir.glob(f"{name}*.jsonl"))  # one, or one a benchmark
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    rewards = [row["reward"] or 0.0 for row in rows if row["sample"] == "greedy"]
    right = sum(reward >= 1.0 for reward in rewards)
    return f"{right} of {len(rewards)} ({right / len(rewards):.0%})"
