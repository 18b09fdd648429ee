"""The demo in bfloat16 with dithered masters and without, side by side: the curves of examples/BFLOAT16.md.

    .venv/bin/python examples/quickstart.py model.dtype=bfloat16 run_dir=runs/dithered
    .venv/bin/python examples/quickstart.py model.dtype=bfloat16 run_dir=runs/nearest optim.dither=false
    .venv/bin/python tests/benchmarks/dither.py runs/dithered runs/nearest

Writes tests/benchmarks/results/dither.json and examples/dither.png. Needs a CPU that multiplies bfloat16, or a GPU.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from astar_megatron.run.tracking import read_metrics

ROOT = Path(__file__).resolve().parents[2]
KEYS = ("reward_mean", "changed_weights", "logratio_mean")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dithered", type=Path)
    parser.add_argument("nearest", type=Path)
    folders = vars(parser.parse_args())
    curves = {
        name: {key: [line[key] for line in read_metrics(str(folder))] for key in KEYS}
        for name, folder in folders.items()
    }
    (ROOT / "tests/benchmarks/results/dither.json").write_text(json.dumps(curves, indent=1) + "\n", encoding="utf-8")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for (name, curve), colour in zip(curves.items(), ("#0072B2", "#D55E00"), strict=True):
        left.plot(curve["reward_mean"], color=colour, marker="o", markersize=3, label=name)
        right.plot(curve["changed_weights"], color=colour, marker="o", markersize=3, label=name)
    left.set(xlabel="step", ylabel="mean reward of 64 rollouts", ylim=(0, 1))
    right.set(xlabel="step", ylabel="share of weights changed", ylim=(0, None))
    left.legend(frameon=False)
    figure.savefig(ROOT / "examples/dither.png", dpi=120)


if __name__ == "__main__":
    main()
