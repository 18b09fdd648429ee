"""What `astar scale fit` leaves: fit.json with everything, fit.csv a line a law, fit.md for people, fit.png."""

import json
import math
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from astar_megatron.data.files import write_atomic, write_figure
from astar_megatron.data.table_text import csv_text, markdown_table
from astar_megatron.studies.extrapolation import NEEDED, Extrapolation, LawResult, Number
from astar_megatron.studies.score_curves import Curve
from astar_megatron.studies.spread import LEVEL

FILES = ("fit.json", "fit.csv", "fit.md", "fit.png")
_NUMBERS = ("asymptote", "exponent", "middle", "start")
_CSV_COLUMNS = (
    *("curve", "runs", "asked_runs", "lost_rows"),
    *("law", "is_best", "verdict", "late_error", "late_share", "sigma", "refusal"),
    *(name + end for name in _NUMBERS for end in ("", "_low", "_high")),
)
_COLUMNS = ("curve", "runs", "points", "verdict", "nearest law", "late error", "asymptote", "exponent")
_PANELS, _MOST_PANELS = 3, 60  # in a row of the picture, and in all
_DRAWN = 200  # points of a line
_LETTERS, _MOST_LINES = 56, 8  # of a title over one panel


def write(folder: Path, curves: Sequence[Curve], results: Sequence[Extrapolation], tolerance: float) -> None:
    """Write all FILES, each whole, to an existing folder."""
    tree, (whole, table, words, picture) = as_json(curves, results, tolerance), (folder / name for name in FILES)
    write_atomic(whole, (json.dumps(tree, indent=1, allow_nan=False) + "\n").encode())
    write_atomic(table, as_csv(curves, results).encode())
    write_atomic(words, as_markdown(curves, results, tolerance).encode())
    plot(curves, results, picture)


def as_json(curves: Sequence[Curve], results: Sequence[Extrapolation], tolerance: float) -> dict[str, Any]:
    """Return everything, as JSON has it; an end that the points do not set is null."""
    return {
        "tolerance": tolerance,
        "needed_share": NEEDED,
        "interval_level": LEVEL,
        "curves": [
            {
                "name": result.name,
                "compute": curve.compute,
                "score": curve.score,
                "points": len(result.points),
                "runs": curve.runs,
                "asked_runs": curve.asked_runs,
                "lost_rows": len(curve.lost),
                "lost_from": min(curve.lost, default=None),
                "lost_at_end": curve.lost_at_end,
                "fitted_up_to": result.split,
                "verdict": result.verdict,
                "reason": result.reason,
                "best_law": result.best and result.best.law,
                "laws": [_law(law) for law in result.laws],
                "late_means": [
                    {"compute": compute, "score": score, "points": count}
                    | {law.law: float(law.early.score(np.array([compute]))[0]) for law in result.laws if law.early}
                    for compute, score, count in result.late.rows()
                ],
            }
            for curve, result in zip(curves, results, strict=True)
        ],
    }


def _law(law: LawResult) -> dict[str, Any]:
    return {
        "law": law.law,
        "refusal": law.refusal,
        "late_error": law.error,
        "late_share": law.share,
        "sigma": law.whole and law.whole.sigma,
        "dependence": law.whole and law.whole.spread.dependence,
        "numbers": {
            name: {"value": number.value, "interval": _ends(number), "refusal": number.refusal}
            for name, number in law.numbers.items()
        },
    }


def _ends(number: Number) -> list[float | None] | None:
    return number.interval and [end if math.isfinite(end) else None for end in number.interval]


def as_csv(curves: Sequence[Curve], results: Sequence[Extrapolation]) -> str:
    """Return a line a curve and law, with the numbers that the points can tell."""
    rows = []
    for curve, result in zip(curves, results, strict=True):
        own = (curve.name, curve.runs, curve.asked_runs, len(curve.lost))
        for law in result.laws:
            numbers: list[float | None] = []
            for name in _NUMBERS:
                number = law.numbers.get(name)
                if number is None or number.refusal:
                    numbers += [None, None, None]
                else:
                    numbers += [number.value, *(_ends(number) or (None, None))]
            sigma = law.whole and law.whole.sigma
            is_best = result.best is law
            judged = (law.law, is_best, result.verdict, law.error, law.share, sigma, law.refusal)
            rows.append((*own, *judged, *numbers))
    return csv_text(_CSV_COLUMNS, rows)


def as_markdown(curves: Sequence[Curve], results: Sequence[Extrapolation], tolerance: float) -> str:
    """Return the verdicts as a table, and why."""
    rows = []
    for curve, result in zip(curves, results, strict=True):
        runs = f"{curve.runs} of {curve.asked_runs}" if curve.runs < curve.asked_runs else str(curve.runs)
        numbers = result.laws[0].numbers
        error = "" if result.best is None else f"{result.best.error:.3g}"
        own = (_shown(numbers.get("asymptote")), _shown(numbers.get("exponent")))
        nearest = result.best.law if result.best else ""
        rows.append((result.name, runs, len(result.points), result.verdict, nearest, error, *own))
    lines = [
        markdown_table(_COLUMNS, rows),
        "",
        "Fitted to the points up to half of the largest compute, compared with the means of ten equal parts of the "
        f"rest. A curve extrapolates where the nearest law is within {tolerance:g} of {NEEDED:.0%} of them. Asymptote "
        f"and exponent: of the sigmoid fitted to all points, with their {LEVEL:.0%} intervals.",
        "",
    ]
    if len(results) > 1:
        lines += [_all_together(results, tolerance), ""]
    for curve, result in zip(curves, results, strict=True):
        lines.append(f"- {result.name} ({curve.score} by {curve.compute}): {result.verdict}. {result.reason}.")
        lines += [f"  - {words}." for words in _left_out(curve)]
        named = ((name, number.refusal) for name, number in result.laws[0].numbers.items())
        lines += [f"  - {name}: not known; {refusal}." for name, refusal in named if refusal]
        lines += [f"  - not fitted: {law.refusal}." for law in result.laws if law.refusal and len(result.points)]
    return "\n".join(lines) + "\n"


def _left_out(curve: Curve) -> list[str]:
    """What the points of a curve lack, in words."""
    words = []
    if curve.runs < curve.asked_runs:
        words.append(f"{curve.runs} of {curve.asked_runs} runs have points; the others failed, or have not ended")
    if curve.lost:
        rows, first = len(curve.points) + len(curve.lost), min(curve.lost)
        words.append(
            f"{len(curve.lost)} of {rows} rows have no score but nan or null, from {curve.compute} {first:.3g} on"
        )
    return words


def _all_together(results: Sequence[Extrapolation], tolerance: float) -> str:
    means = [len(result.late.score) for result in results]
    shares = [(result.best and result.best.share) or 0.0 for result in results]  # without a law no mean is near
    near = sum(round(share * count) for share, count in zip(shares, means, strict=True))
    verdicts = Counter(result.verdict for result in results)
    extrapolates, does_not, untold = (verdicts[name] for name in ("extrapolates", "does not", "can't be told"))
    return (
        f"Of {len(results)} curves {extrapolates} can be extrapolated, {does_not} can't be, and of {untold} it can't "
        f"be told. {near} of {sum(means)} later means are within {tolerance:g} of the nearest law."
    )


def _shown(number: Number | None) -> str:
    if number is None or number.interval is None:
        return "not known"
    return f"{number.value:.3g} ({number.interval[0]:.3g} to {number.interval[1]:.3g})"


def plot(curves: Sequence[Curve], results: Sequence[Extrapolation], path: Path) -> None:
    """Draw a panel a curve: points, late means, the laws of the first half, and the sigmoid of all with its band."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = [pair for pair in zip(curves, results, strict=True) if len(pair[0].points)][:_MOST_PANELS]
    titles = [_wrapped(f"{result.name}: {result.verdict}") for _, result in drawn]
    rows, in_a_row = max(1, -(-len(drawn) // _PANELS)), max(1, min(_PANELS, len(drawn)))
    size = (4.4 * in_a_row, (3.3 + 0.14 * max((title.count("\n") for title in titles), default=0)) * rows + 0.4)
    figure, panels = pyplot.subplots(rows, in_a_row, figsize=size, dpi=120, squeeze=False, layout="constrained")
    for axes in panels.flat[len(drawn) :]:
        axes.set_visible(False)
    for axes, title, (curve, result) in zip(panels.flat, titles, drawn, strict=False):
        compute, late = result.points.compute, result.late
        grid = np.linspace(max(compute.min(), compute.max() / _DRAWN), compute.max(), _DRAWN)
        axes.plot(compute, result.points.score, ".", color="#999999", markersize=3)
        axes.axvline(result.split, color="#cccccc", linewidth=0.8)
        if whole := result.laws[0].whole:
            axes.fill_between(grid, *whole.band(grid), color="#333333", alpha=0.15, linewidth=0)
        for number, law in enumerate(result.laws):
            if law.early is not None:
                axes.plot(grid, law.early.score(grid), "--", color=f"C{number}", linewidth=1, label=law.law)
        axes.plot(late.compute, late.score, "o", color="#000000", markersize=3.5, fillstyle="none")
        low, high = float(result.points.score.min()), float(result.points.score.max())
        margin = 0.1 * (high - low) + 0.01 * max(1.0, abs(low), abs(high))
        axes.set(ylim=(low - margin, high + margin))
        axes.set_xlabel(curve.compute, parse_math=False)
        axes.set_ylabel(curve.score, parse_math=False)
        axes.set_title(title, fontsize=8, parse_math=False)
        axes.spines[["top", "right"]].set_visible(False)
    if named := [axes for axes in panels.flat if axes.get_legend_handles_labels()[1]]:
        named[0].legend(loc="lower right", frameon=False, fontsize=7)
    more = f"; {len(results) - len(drawn)} more curves are in fit.json" if len(results) > len(drawn) else ""
    words = f"dashed: fitted to the first half; grey: sigmoid of all, {LEVEL:.0%}; rings: means{more}"
    figure.suptitle(_wrapped(words, in_a_row), fontsize=8)
    write_figure(path, figure)
    pyplot.close(figure)


def _wrapped(text: str, panels: int = 1) -> str:
    """The text in lines that are no wider than so many panels."""
    return "\n".join(textwrap.wrap(text, _LETTERS * panels, max_lines=_MOST_LINES, break_on_hyphens=False))
