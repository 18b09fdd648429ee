"""PROGRAM: what scores by compute say: three laws, held against the second half. The laws: studies/laws.py."""

import math
from collections.abc import Sequence
from pathlib import Path

from astar_megatron.data.files import make_folder
from astar_megatron.run.tracking import Screen
from astar_megatron.studies import extrapolation_files
from astar_megatron.studies.extrapolation import extrapolate
from astar_megatron.studies.score_curves import files_of, read_curves


def fit(
    sources: Sequence[str], out: Path, compute: str | None, score: str | None, *, per_row: bool, tolerance: float
) -> None:
    """Fit the laws to runs and tables, and write what they say to `out`."""
    if not math.isfinite(tolerance):
        raise ValueError(f"--tolerance: expected a number of 0 or more, got {tolerance}")
    written = {(out / name).resolve() for name in extrapolation_files.FILES}
    if read := {path.resolve() for path in files_of(sources)} & written:
        raise ValueError(f"--out {out}: {read.pop()} is read, and would be written over; give another folder")
    if folders := [path for path in written if path.is_dir()]:
        raise ValueError(f"--out {out}: {folders[0].name} is a folder there; give another, or remove it")
    curves, screen = read_curves(sources, compute, score, per_row=per_row), Screen()
    make_folder(out)  # before the fits, which take long
    count, results = sum(len(curve.points) for curve in curves), []

    def progress() -> str:
        return f"curve {min(len(results) + 1, len(curves))} of {len(curves)}"

    with screen.waiting(f"fitting {count:,} points of {len(curves)} curve{'s' * (len(curves) != 1)}", progress):
        for curve in curves:
            results.append(extrapolate(curve.name, curve.points, tolerance, curve.lost_at_end))
    extrapolation_files.write(out, curves, results, tolerance)
    screen.say(extrapolation_files.as_markdown(curves, results, tolerance))
    screen.say(f"fit.md, fit.csv, fit.json and fit.png are in {out}")
