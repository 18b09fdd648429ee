"""Scores over compute, read from runs of ours and from the tables of other trainers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from astar_megatron.studies.laws import Points
from astar_megatron.studies.score_columns import Columns, runs_of_table
from astar_megatron.studies.score_sums import scores_over_compute
from astar_megatron.studies.score_tables import table_file


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Scores over compute, of one run or several that differ by their seed."""

    name: str
    compute: str  # what it is counted in
    score: str
    points: Points


def read_curves(
    sources: Sequence[str], compute: str | None = None, score: str | None = None, *, per_row: bool = False
) -> list[Curve]:
    """Return the curves of files and run folders; those that are given as NAME=PATH with one NAME are one curve.

    Of a table that has several, as a study's or a comparison's, each is "NAME: curve". `compute` and `score` name
    columns, instead of those that are known. Raises ValueError where a table has none, is given twice, or has a curve
    of the name of another's.
    """
    parts: dict[str, list[tuple[Columns, list[float], list[float]]]] = {}
    origins: dict[str, tuple[str | None, Path]] = {}
    for name, path in _distinct(sources):
        for run in runs_of_table(path, name, compute, score, per_row=per_row):
            if not run.curve.isprintable():
                raise ValueError(f"{path}: can't print the curve's name {run.curve!r}; give another, as NAME={path}")
            other_name, other = origins.setdefault(run.curve, (name, path))
            if path != other and (name is None or name != other_name):
                raise ValueError(
                    f"{other} and {path} both have a curve {run.curve!r}; give them names, as A={other} and B={path}, "
                    "or one name, if they are runs of one curve"
                )
            parts.setdefault(run.curve, []).append((run.columns, *scores_over_compute(run.rows, run.columns, path)))
    return [_joined(name, runs) for name, runs in parts.items()]


def files_of(sources: Sequence[str]) -> list[Path]:
    """Return the file that is read of each source."""
    return [table_file(_named(source)[1]) for source in sources]


def _distinct(sources: Sequence[str]) -> Iterator[tuple[str | None, Path]]:
    """Yield the name, None without, and the path of each source. Raises ValueError where two are one table."""
    files: dict[Path, str] = {}
    for source in sources:
        name, path = _named(source)
        file = table_file(path).resolve()
        if file in files:
            raise ValueError(f"{source}: the same table as {files[file]}, its points would count twice; give it once")
        files[file] = source
        yield name, path


def _named(source: str) -> tuple[str | None, Path]:
    name, separator, path = source.partition("=")
    return (name, Path(path)) if separator and name and not Path(source).exists() else (None, Path(source))


def _joined(name: str, runs: Sequence[tuple[Columns, Sequence[float], Sequence[float]]]) -> Curve:
    columns = runs[0][0]
    if len({(each.compute, each.score) for each, _, _ in runs}) > 1:
        raise ValueError(
            f"{name}: its tables count different things ({', '.join(sorted({each.compute for each, _, _ in runs}))}; "
            f"{', '.join(sorted({each.score for each, _, _ in runs}))}); give --compute and --score"
        )
    number = np.repeat(np.arange(len(runs)), [len(compute) for _, compute, _ in runs])
    points = Points(
        np.array([value for _, compute, _ in runs for value in compute]),
        np.array([value for _, _, score in runs for value in score]),
        number,
    )
    return Curve(name=name, compute=columns.compute, score=columns.score, points=points)
