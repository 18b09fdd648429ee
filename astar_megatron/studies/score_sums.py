"""The compute that each score of a run took: a column that counts up, or a row's own compute, added up."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from astar_megatron.studies.score_columns import OF_A_STEP, Columns
from astar_megatron.studies.score_tables import Row

_STEPS = ("training/global_step", "train/global_step", "global_step", "step", "Step", "_step")
_MOST = 1e100  # whose squares the fit can still add up


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Compute and score of the rows of a run that have one, and the compute of those whose score is lost."""

    compute: Sequence[float]
    score: Sequence[float]
    lost: Sequence[float]  # of the rows whose score is nan or null; one without a score was not evaluated
    lost_at_end: int  # of these, after the last score


def scores_over_compute(rows: Sequence[Row], columns: Columns, path: Path) -> Scores:
    """Return the scores of a run; the compute of each is that of the rows up to it.

    Raises ValueError, with file and row, where the compute falls, or can't be added up.
    """
    if columns.per_row:
        _check_steps(rows, columns, path)
    compute, scores, lost, lost_at_end, total = [], [], [], 0, 0.0
    for number, row in enumerate(rows, 1):
        where = f"{path}, row {number}"
        value, score = _known(row, columns.compute, where), _number(row, columns.score, where)
        if value is not None:
            if value < 0:
                raise ValueError(f"{where}: {columns.compute} is {value:g}; compute is 0 or more")
            total = total + value if columns.per_row else value
        if score is None or (value is None and not columns.per_row):
            continue
        if math.isnan(score):
            lost.append(total)
            lost_at_end += 1
        else:
            if compute and total < compute[-1]:
                raise ValueError(
                    f"{where}: {columns.compute} falls from {compute[-1]:.6g} to {total:.6g}; give the rows in order "
                    "of their steps, each once, a table a run; or --per-row, if the compute is a row's own"
                )
            if compute and not columns.per_row and (total, score) == (compute[-1], scores[-1]):
                raise ValueError(
                    f"{where}: {columns.compute} and {columns.score} are those of the point before, which would count "
                    "twice; give each row once, and a table a run"
                )
            compute.append(total)
            scores.append(score)
            lost_at_end = 0
    if not scores and not lost:
        raise ValueError(
            f"{path}: no row has both {columns.compute} and {columns.score}; name others by --compute, --score"
        )
    return Scores(compute=compute, score=scores, lost=lost, lost_at_end=lost_at_end)


def _check_steps(rows: Sequence[Row], columns: Columns, path: Path) -> None:
    """Raise ValueError where rows, each with its own compute, don't add up to what their scores took.

    A score in front of all compute, at step 0, is the untrained model's.
    """
    steps = next((name for name in _STEPS if any(row.get(name) not in (None, "") for row in rows)), "")
    before = None
    for number, row in enumerate(rows, 1):
        where = f"{path}, row {number}"
        step = _known(row, steps, where)
        if _known(row, columns.compute, where) is None:
            if _known(row, columns.score, where) is not None and (number > 1 or step):
                raise ValueError(
                    f"{where}: has {columns.score}, but no {columns.compute}, which is added up over the rows; give it "
                    "for each, or name by --compute a column that counts up"
                )
        elif step is not None:
            if before is not None and step <= before:
                raise ValueError(
                    f"{where}: {steps} is {step:g} after {before:g}, and {columns.compute} is added up over the rows; "
                    "give them in order of their steps, each once, as a resumed run has left them"
                )
            if columns.compute in OF_A_STEP and step > (1 if before is None else before + 1):
                raise ValueError(
                    f"{where}: {steps} is {step:g} {'at first' if before is None else f'after {before:g}'}, and the "
                    f"{columns.compute} of steps before it is missing; export every step from the first, or name by "
                    "--compute a column that counts up"
                )
            before = step


def _known(row: Row, name: str, where: str) -> float | None:
    """The number of a cell; None where it is empty or nan."""
    number = _number(row, name, where)
    return None if number is None or math.isnan(number) else number


def _number(row: Row, name: str, where: str) -> float | None:
    """The number of a cell, nan where it is null; None where the cell is empty."""
    value = row.get(name, "")
    if value == "":
        return None
    try:
        number = math.nan if value is None else float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{where}, {name}: expected a number, got {value!r:.60}") from None
    if abs(number) > _MOST:
        raise ValueError(
            f"{where}, {name}: expected a number up to {_MOST:g}, got {number:g}; repair it, or count in another unit"
        )
    return number
