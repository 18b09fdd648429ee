"""Scores over compute, read from runs of ours and from the tables of other trainers."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from astar_megatron.studies.laws import Points
from astar_megatron.studies.score_columns import Columns, curve_name, runs_of_table
from astar_megatron.studies.score_sums import Scores, scores_over_compute
from astar_megatron.studies.score_tables import asked_runs, table_file


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Scores over compute, of one run or several that differ by their seed."""

    name: str
    compute: str  # what it is counted in
    score: str
    points: Points
    asked_runs: int  # how many it was to have; a run that failed, or has not ended, has no points
    lost: Sequence[float] = ()  # compute of the rows whose score is nan or null
    lost_at_end: int = 0  # of these, after the last score of their run

    @property
    def runs(self) -> int:
        return len(np.unique(self.points.run))


class _Part(NamedTuple):
    path: Path
    columns: Columns
    scores: Scores


def read_curves(
    sources: Sequence[str], compute: str | None = None, score: str | None = None, *, per_row: bool = False
) -> list[Curve]:
    """Return the curves of files and run folders; those that are given as NAME=PATH with one NAME are one curve.

    Of a table that has several, as a study's or a comparison's, each is "NAME: curve"; one without a finished run has
    no points. `compute` and `score` name columns, instead of those that are known. Raises ValueError where a table has
    none, is given twice, or has a curve of the name of another's.
    """
    columns: dict[str, Columns] = {}
    parts: dict[str, list[_Part]] = {}
    asked: Counter[str] = Counter()
    origins: dict[str, tuple[str | None, Path]] = {}
    for name, path in _distinct(sources):
        runs = runs_of_table(path, name, compute, score, per_row=per_row)
        for curve, number in asked_runs(path).items():
            columns.setdefault(curve_name(name, curve), runs[0].columns)
            asked[curve_name(name, curve)] += number
        for run in runs:
            if not run.curve.isprintable():
                raise ValueError(f"{path}: can't print the curve's name {run.curve!r}; give another, as NAME={path}")
            other_name, other = origins.setdefault(run.curve, (name, path))
            if path != other and (name is None or name != other_name):
                raise ValueError(
                    f"{other} and {path} both have a curve {run.curve!r}; give them names, as A={other} and B={path}, "
                    "or one name, if they are runs of one curve"
                )
            columns.setdefault(run.curve, run.columns)
            scores = scores_over_compute(run.rows, run.columns, path)
            parts.setdefault(run.curve, []).append(_Part(path, run.columns, scores))
    return [_joined(name, own, parts.get(name, []), asked[name]) for name, own in columns.items()]


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


def _check_copies(name: str, parts: Sequence[_Part]) -> None:
    """Raise ValueError where two tables have the same points; a single point may well be another's too."""
    tables: dict[tuple[tuple[float, ...], ...], Path] = {}
    for path, _, scores in parts:
        other = tables.setdefault((tuple(scores.compute), tuple(scores.score)), path)
        if other != path and len(scores.score) > 1:
            raise ValueError(
                f"{name}: {path} has the points of {other}, all of which would count twice; give one of them"
            )


def _joined(name: str, columns: Columns, parts: Sequence[_Part], asked: int) -> Curve:
    _check_copies(name, parts)
    scores = [part.scores for part in parts]
    counted, scored = {part.columns.compute for part in parts}, {part.columns.score for part in parts}
    if len(counted) > 1 or len(scored) > 1:
        raise ValueError(
            f"{name}: its tables count different things ({', '.join(sorted(counted))}; {', '.join(sorted(scored))}); "
            "give --compute and --score"
        )
    points = Points(
        np.array([value for each in scores for value in each.compute]),
        np.array([value for each in scores for value in each.score]),
        np.array([run for run, each in enumerate(scores) for _ in each.score], dtype=int),
    )
    return Curve(
        name=name,
        compute=columns.compute,
        score=columns.score,
        points=points,
        asked_runs=max(asked, len(parts)),
        lost=[value for each in scores for value in each.lost],
        lost_at_end=sum(each.lost_at_end for each in scores),
    )
