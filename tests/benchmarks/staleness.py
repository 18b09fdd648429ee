"""What rollouts of older weights cost: reward of the demo against `rollout.max_staleness`, at equal tokens.

    .venv/bin/python tests/benchmarks/staleness.py --compared runs/compare

One run of astar and one of oapl for each k of 1, 4 and 16, with the table, the seed and the budget of a comparison that
`astar compare` made of the demo; its runs of seed 0 are k = 0. Writes results/staleness.json and .png. On two cores
engines and policy take each other's time: how stale rollouts are depends on both, so it is measured and written too.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from astar_megatron import config
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
    end = run_command("train", config.validate(tree), astar)
    if end.status:
        sys.exit(f"{tree['run_dir']}: {end.error}")
    return Path(tree["run_dir"])


def curve(run_dir: Path) -> dict[str, Any]:
    """Return reward and staleness of each step by the tokens that were spent on steps up to it."""
    lines = read_metrics(run_dir)
    tokens = [Cost.of_step(line).tokens for line in lines]
    last = lines[-4:]
    return {
        "tokens": [sum(tokens[: number + 1]) for number in range(len(lines))],
        "reward_mean": [line["reward_mean"] for line in lines],
        "staleness_mean": [line["staleness_mean"] for line in lines],
        "staleness_max": [line["staleness_max"] for line in lines],
        "seconds": [line["seconds"]["total"] for line in lines],
        "reward_of_last_4_steps": sum(line["reward_mean"] for line in last) / len(last),
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
        axes.legend(loc="lower right", frameon=False)
    panels[0].set(ylabel="mean reward of the step")
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compared", type=Path, required=True, help="folder of a comparison of astar and oapl")
    parser.add_argument("--out", type=Path, default=Path("runs/staleness"))
    arguments = parser.parse_args()
    curves: dict[str, dict[str, Any]] = {}
    for method in METHODS:
        curves[method] = {"0": curve(arguments.compared / f"{method}-0")}
        for staleness in STALENESS:
            curves[method][str(staleness)] = curve(run(arguments.compared, method, staleness, arguments.out))
    (RESULTS / "staleness.json").write_text(json.dumps(curves, indent=1) + "\n", encoding="utf-8")
    plot(curves, RESULTS / "staleness.png")


if __name__ == "__main__":
    main()
