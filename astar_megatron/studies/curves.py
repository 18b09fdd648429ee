"""Mean reward of methods against what they have cost, drawn as a line with a band over the seeds."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from astar_megatron.data.files import write_figure
from astar_megatron.run.spending import Measure
from astar_megatron.studies.comparison import UNITS, Result

_POINTS = 200  # of a curve
_BAND = "line: mean over the seeds; band: the lowest to the highest; thin: each run"


def band(curves: Sequence[tuple[Sequence[float], Sequence[float]]]) -> np.ndarray:
    """Return [4, points] x, mean, least and most of curves (x rising, y), interpolated on x that they share.

    It begins where the last of them begins and ends where the first of them ends, so no point lies beyond a run's
    end; it is empty where they share no x.
    """
    start, end = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    if start > end:
        return np.empty((4, 0))
    grid = np.unique(np.linspace(start, end, _POINTS))
    rows = np.stack([np.interp(grid, x, y) for x, y in curves])  # [curves, points]
    return np.stack([grid, rows.mean(0), rows.min(0), rows.max(0)])


def plot(results: Sequence[Result], path: Path) -> None:
    """Draw three panels to `path`: mean reward of each step's responses by tokens, FLOPs and seconds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    methods = list(dict.fromkeys(result.run.cell for result in results))
    measures: list[Measure] = list(UNITS)
    figure, panels = pyplot.subplots(1, len(measures), figsize=(13, 4), dpi=120, sharey=True)
    for axes, measure in zip(panels, measures, strict=True):
        for number, method in enumerate(methods):
            color = f"C{number}"
            curves = [_curve(result, measure) for result in results if result.run.cell == method]
            for x, y in curves:
                axes.plot(x, y, color=color, alpha=0.35, linewidth=0.7, marker="." if len(x) == 1 else None)
            x, mean, least, most = band(curves)
            axes.fill_between(x, least, most, color=color, alpha=0.2, linewidth=0)
            axes.plot(x, mean, color=color, label=method, marker="o" if len(x) == 1 else None)
        axes.set(xlabel=UNITS[measure], xlim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set(ylabel="mean reward of the step")
    if methods:
        panels[-1].legend(loc="lower right", frameon=False)
    figure.suptitle(_BAND, fontsize=9)
    figure.tight_layout()
    write_figure(path, figure)
    pyplot.close(figure)


def _curve(result: Result, measure: Measure) -> tuple[list[float], list[float]]:
    return [step.spent.by(measure) for step in result.steps], [step.reward_mean for step in result.steps]
