"""The compute that each score of a run took: a column that counts up, or a row's own compute, added up."""

import math
from collections.abc import Sequence
from pathlib import Path

from astar_megatron.studies.score_columns import OF_A_STEP, Columns
from astar_megatron.studies.score_tables import Row

_STEPS = ("training/global_step", "train/global_step", "global_step", "step", "Step", "_step")
_MOST = 1e100  # whose squares the fit can still add up


def scores_over_compute(rows: Sequence[Row], columns: Columns, path: Path) -> tuple[list[float], list[float]]:
    """Return the compute and the score of the rows that have a score; the compute is that of the rows up to it.

    Raises ValueError, with file and row, where the compute falls, or can't be added up.
    """
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
            if columns.compute in OF_A_STEP and step > (1 if before is None else before + 1):
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
