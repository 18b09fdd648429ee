"""Scores over compute, read from runs of ours and from the tables of other trainers.

A run's folder, a study's `scale.csv`, a comparison's `compare.csv`, a CSV or JSONL of metrics with a row a step (W&B's
export of a run's history, TRL's `log_history`), or the CSV that W&B writes of a chart: "RUN - METRIC" columns beside
that of its axis. Which columns are meant is known of the trainers in `_KINDS`, and can be named.
"""

import csv
import io
import json
import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from astar_megatron.run.spending import Cost
from astar_megatron.run.tracking import METRICS_FILE, greedy_scores, read_metrics
from astar_megatron.studies.laws import Points

type Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Which columns are read. `per_row`: the compute is a row's own, and is added up; of a known trainer a step's."""

    compute: str
    score: str
    per_row: bool = False
    curve: str | None = None  # where a table has several curves
    run: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Scores over compute, of one run or several that differ by their seed."""

    name: str
    compute: str  # what it is counted in
    score: str
    points: Points


_KINDS = (
    Columns(compute="spent_flops", score="score", curve="cell", run="seed"),  # of astar scale run
    Columns(compute="spent_flops", score="reward_mean", curve="method", run="seed"),  # of astar compare
    Columns(compute="spent_flops", score="reward_mean"),  # of a run's folder
    Columns(compute="perf/total_num_tokens", score="critic/score/mean", per_row=True),  # verl
    Columns(compute="train/total_num_tokens", score="train/reward", per_row=True),  # NeMo-RL
    Columns(compute="train/num_tokens", score="train/reward"),  # TRL, by W&B
    Columns(compute="num_tokens", score="reward"),  # TRL, its own
)
_OF_A_STEP = frozenset(kind.compute for kind in _KINDS if kind.per_row)
_STEPS = ("training/global_step", "train/global_step", "global_step", "step", "Step", "_step")
_MOST = 1e100  # whose squares the fit can still add up
_CHART = re.compile(r"(?P<run>.+) - (?P<metric>.+?)(?P<bound>__MIN|__MAX)?")


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
        for curve, columns, rows in _tables(path, name, compute, score, per_row=per_row):
            other_name, other = origins.setdefault(curve, (name, path))
            if path != other and (name is None or name != other_name):
                raise ValueError(
                    f"{other} and {path} both have a curve {curve!r}; give them names, as A={other} and B={path}, or "
                    "one name, if they are runs of one curve"
                )
            parts.setdefault(curve, []).append((columns, *_numbers(rows, columns, path)))
    return [_joined(name, runs) for name, runs in parts.items()]


def _distinct(sources: Sequence[str]) -> Iterator[tuple[str | None, Path]]:
    """Yield the name, None without, and the path of each source. Raises ValueError where two are one table."""
    files: dict[Path, str] = {}
    for source in sources:
        name, path = _named(source)
        file = _file(path).resolve()
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


def _tables(
    path: Path, name: str | None, compute: str | None, score: str | None, *, per_row: bool
) -> list[tuple[str, Columns, Sequence[Row]]]:
    """The runs of a source: the name of the curve, the columns to read, the rows.

    A table that says itself which curves it has keeps them apart under a given name.
    """
    rows = _rows(path)
    names = list(dict.fromkeys(key for row in rows for key in row))
    columns = _columns(names, compute, score, per_row=per_row)
    if columns is None:
        runs_of_chart = _of_chart(rows, names, compute, score)
        if not runs_of_chart:
            raise _unknown(path, names, compute, score)
        if per_row or runs_of_chart[0][1].compute in _OF_A_STEP:
            raise ValueError(f"{path}: compute of single steps can't be added up over a chart; give a row a step")
        return [(name or run, columns, own) for run, columns, own in runs_of_chart]
    if columns.curve is None:
        return [(name or (path.name or path.resolve().name if path.is_dir() else path.stem), columns, rows)]
    runs: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        runs.setdefault((str(row.get(columns.curve)), str(row.get(columns.run or columns.curve))), []).append(row)
    return [(f"{name}: {curve}" if name else curve, columns, own) for (curve, _), own in runs.items()]


def _of_chart(
    rows: Sequence[Row], names: Sequence[str], compute: str | None, score: str | None
) -> list[tuple[str, Columns, Sequence[Row]]]:
    """The runs of a chart, none where the table is no chart: one column is its axis, all others are of runs.

    Of W&B's own metrics, as `_step`, only the one that is named is read.
    """
    axes = [name for name in names if not _CHART.fullmatch(name)]
    if len(axes) != 1 or compute not in (None, axes[0]):
        return []
    runs = []
    for match in filter(None, map(_CHART.fullmatch, names)):
        metric = match["metric"]
        if not match["bound"] and (metric == score or (score is None and not metric.startswith("_"))):
            own = [{axes[0]: row.get(axes[0]), metric: row.get(match[0])} for row in rows]
            runs.append((match["run"], Columns(compute=axes[0], score=metric), own))
    return runs


def _columns(names: Sequence[str], compute: str | None, score: str | None, *, per_row: bool) -> Columns | None:
    """The columns that are named, the others those of a known trainer; None where the table lacks them."""
    known = next(
        (kind for kind in _KINDS if {*_asked(kind, compute, score), kind.curve, kind.run} <= {*names, None}), None
    )
    if known is None:
        if compute is None or score is None or not {compute, score} <= {*names}:
            return None
        known = Columns(compute=compute, score=score)
    own_compute, own_score = _asked(known, compute, score)
    return Columns(
        compute=own_compute,
        score=own_score,
        per_row=per_row or own_compute in _OF_A_STEP,
        curve=known.curve,
        run=known.run,
    )


def _unknown(path: Path, names: Sequence[str], compute: str | None, score: str | None) -> ValueError:
    missing = ", ".join(name for name in (compute, score) if name is not None and name not in names)
    return ValueError(
        f"{path}: {f'no column {missing}' if missing else 'not a table of a trainer that is known'}; name its "
        f"columns by --compute and --score; it has {', '.join(sorted(names)[:30]) or 'none'}"
    )


def _asked(kind: Columns, compute: str | None, score: str | None) -> tuple[str, str]:
    return compute or kind.compute, score or kind.score


def _file(path: Path) -> Path:
    """The file that is read of a source."""
    if not path.is_dir():
        return path
    return next((path / name for name in ("scale.csv", "compare.csv") if (path / name).exists()), path / METRICS_FILE)


def _rows(path: Path) -> Sequence[Row]:
    if path.is_dir() and _file(path).name == METRICS_FILE:
        return _of_run(path)
    path = _file(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            rows = list(csv.DictReader(io.StringIO(text, newline=""), restkey="(more)"))
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise ValueError(f"{path}: can't read the table: {error}; give a CSV, a JSONL or a run's folder") from None
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected a header and a row a step, or a JSON object a line; it has none")
    return rows


def _of_run(path: Path) -> list[Row]:
    lines, spent, rows = read_metrics(path), Cost(), []
    if not lines:
        raise ValueError(f"{path}: no {METRICS_FILE} with steps, scale.csv or compare.csv there; give a run's folder")
    for line in lines:
        scores = greedy_scores(line)
        before, spent = spent, spent + Cost.of_step(line)
        costs = {f"spent_{measure}": spent.by(measure) for measure in ("tokens", "flops", "seconds")}
        rows.append(costs | {"reward_mean": line.get("reward_mean")})
        if scores and len(scores) == len(line["eval"]):  # of the weights that the step begins with
            costs = {f"spent_{measure}": before.by(measure) for measure in ("tokens", "flops", "seconds")}
            rows.append(costs | {"score": statistics.fmean(scores.values())})
    return rows


def _numbers(rows: Sequence[Row], columns: Columns, path: Path) -> tuple[list[float], list[float]]:
    """The compute and the score of the rows that have a score; the compute is that of the rows up to it."""
    if columns.per_row:
        _check_steps(rows, columns, path)
    compute, scores, total = [], [], 0.0
    for number, row in enumerate(rows, 1):
        place = f"{path}, row {number}"
        value, score = _number(row, columns.compute, place), _number(row, columns.score, place)
        if value is not None:
            if value < 0:
                raise ValueError(f"{place}: {columns.compute} is {value:g}; compute is 0 or more")
            total = total + value if columns.per_row else value
        if score is not None and (value is not None or columns.per_row):
            if compute and total < compute[-1]:
                raise ValueError(
                    f"{place}: {columns.compute} falls from {compute[-1]:.6g} to {total:.6g}; give the rows in order "
                    "of their steps, each once, a table a run; or --per-row, if the compute is a row's own"
                )
            compute.append(total)
            scores.append(score)
    if not scores:
        raise ValueError(
            f"{path}: no row has both {columns.compute} and {columns.score}; name others by --compute, --score"
        )
    return compute, scores


def _check_steps(rows: Sequence[Row], columns: Columns, path: Path) -> None:
    """Raise ValueError where rows, each with its own compute, don't add up to what their scores took.

    A score in front of all compute, at step 0, is the untrained model's.
    """
    steps = next((name for name in _STEPS if any(row.get(name) not in (None, "") for row in rows)), "")
    before = None
    for number, row in enumerate(rows, 1):
        place = f"{path}, row {number}"
        step = _number(row, steps, place)
        if _number(row, columns.compute, place) is None:
            if _number(row, columns.score, place) is not None and (number > 1 or step):
                raise ValueError(
                    f"{place}: has {columns.score}, but no {columns.compute}, which is added up over the rows; give it "
                    "for each, or name by --compute a column that counts up"
                )
        elif step is not None:
            if before is not None and step <= before:
                raise ValueError(
                    f"{place}: {steps} is {step:g} after {before:g}, and {columns.compute} is added up over the rows; "
                    "give them in order of their steps, each once, as a resumed run has left them"
                )
            if columns.compute in _OF_A_STEP and step > (1 if before is None else before + 1):
                raise ValueError(
                    f"{place}: {steps} is {step:g} {'at first' if before is None else f'after {before:g}'}, and the "
                    f"{columns.compute} of steps before it is missing; export every step from the first, or name by "
                    "--compute a column that counts up"
                )
            before = step


def _number(row: Row, name: str, place: str) -> float | None:
    value = row.get(name)
    if value is None or value == "":
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{place}, {name}: expected a number, got {value!r:.60}") from None
    if abs(number) > _MOST:
        raise ValueError(
            f"{place}, {name}: expected a number up to {_MOST:g}, got {number:g}; repair it, or count in another unit"
        )
    return None if math.isnan(number) else number
