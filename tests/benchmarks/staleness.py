"""What rollouts of older weights cost: reward of the demo against `rollout.max_staleness`, at equal tokens.

    .venv/bin/python tests/benchmarks/staleness.py --compared runs/compare

One run of astar and one of oapl for each k of 1, 4 and 16, with the table and the seed of a comparison that
`astar compare` made of the demo; its runs of seed 0 are k = 0. All end where astar's had spent its budget on steps.
Writes results/staleness.json and .png. On two cores engines and policy take each other's time: how stale rollouts are
depends on both, so it is measured and written too. The reward of a step is that of the weights that drew it, k
versions ago: `greedy_score_after` is that of the weights which these steps have made.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from astar_megatron import config
from astar_megatron.run import scores
from astar_megatron.run.commands import astar, run_command
from astar_megatron.run.spending import Cost
from astar_megatron.run.tracking import read_metrics

RESULTS = Path(__file__).parent / "results"
METHODS, STALENESS = ("astar", "oapl"), (1, 4, 16)


def run(compared: Path, method: str, staleness: int, folder: Path) -> Path:
    """Train as the comparison did, but with engines that draw ahead; return the run folder. Goes on if it is there."""
    tree = json.loads((compared / f"{method}-0" / "run.json").read_text(encoding="utf-8"))
    tree["run_dir"] = str(folder / f"{method}-{staleness}")
    tree["rollout"]["max_staleness"] = staleness
    tree["budget"]["tokens"] = tokens_of(compared)
    end = run_command("train", config.validate(tree), astar)
    if end.status:
        sys.exit(f"{tree['run_dir']}: {end.error}")
    return Path(tree["run_dir"])


def tokens_of(compared: Path) -> int:
    """Return what stage 1 left of astar's budget: the response tokens that each run here may draw for its steps."""
    return json.loads((compared / "astar-0" / "run.json").read_text(encoding="utf-8"))["budget"]["tokens"]


def curve(run_dir: Path, tokens: int) -> dict[str, Any]:
    """Return reward and staleness of each step, up to the one that reaches `tokens`, by the tokens spent up to it."""
    lines, spent = [], []
    for line in read_metrics(run_dir):
        if not spent or spent[-1] < tokens:
            lines.append(line)
            spent.append(Cost.of_step(line).tokens + (spent[-1] if spent else 0))
    last, is_whole = lines[-4:], len(lines) == len(read_metrics(run_dir))  # k = 0 may have had tokens for more steps
    return {
        "tokens": spent,
        "reward_mean": [line["reward_mean"] for line in lines],
        "staleness_mean": [line["staleness_mean"] for line in lines],
        "staleness_max": [line["staleness_max"] for line in lines],
        "seconds": [line["seconds"]["total"] for line in lines],
        "reward_of_last_4_steps": sum(line["reward_mean"] for line in last) / len(last),
        "greedy_score_after": scores.mean_of_step(run_dir, len(lines)) if is_whole else None,
    }


def plot(curves: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw a panel a method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(METHODS), figsize=(10, 3.6), dpi=120, sharey=True)
    for axes, method in zip(panels, METHODS, strict=True):
        for staleness, values in curves[method].items():
            oldest = max(values["staleness_max"])
            axes.plot(values["tokens"], values["reward_mean"], marker=".", label=f"k = {staleness} (oldest {oldest})")
        axes.set(title=method, xlabel="response tokens of the steps", ylim=(0, 1))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper left", frameon=False)
    panels[0].set(ylabel="mean reward of the step")
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compared", type=Path, required=True, help="folder of a comparison of astar and oapl")
    parser.add_argument("--out", type=Path, default=Path("runs/staleness"))
    arguments = parser.parse_args()
    curves: dict[str, dict[str, Any]] = {}
    tokens = tokens_of(arguments.compared)
    for method in METHODS:
        curves[method] = {"0": curve(arguments.compared / f"{method}-0", tokens)}
        for staleness in STALENESS:
            curves[method][str(staleness)] = curve(run(arguments.compared, method, staleness, arguments.out), tokens)
    (RESULTS / "staleness.json").write_text(json.dumps(curves, indent=1) + "\n", encoding="utf-8")
    plot(curves, RESULTS / "staleness.png")


if __name__ == "__main__":
    main()
