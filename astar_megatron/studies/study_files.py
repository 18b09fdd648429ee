"""What a scaling study leaves: scale.json, by which it goes on, scale.csv a line a step, scale.md for people."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from astar_megatron.algorithm.estimators import mean_and_error
from astar_megatron.data.files import write_atomic, write_json
from astar_megatron.data.table_text import csv_text, markdown_table
from astar_megatron.run import machine
from astar_megatron.studies import unfinished
from astar_megatron.studies.comparison import UNITS, Budget, Run, Stage1Cost
from astar_megatron.studies.study import Score, Study

JSON_FILE = "scale.json"
_COLUMNS = ("cell", "seed", "steps", "spent_tokens", "spent_flops", "spent_seconds", "reward_mean", "score")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What is known of a study by now."""

    study: Study
    settings: Mapping[str, Mapping[str, Any]]  # of each cell
    stage_1: dict[str, Stage1Cost]  # of the cells that read it
    courses: dict[Run, list[Score]]  # of the finished runs
    errors: dict[Run, str]  # of those that failed


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Return by cell what a folder's study has: `settings`, and `finished`, the seeds whose runs are.

    Nothing where there is none. Raises ValueError where the folder holds something else.
    """
    path = folder / JSON_FILE
    if not path.exists():
        return {}
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        return {
            name: {
                "settings": dict(cell["settings"]),
                "finished": [int(seed) for seed, run in cell["runs"].items() if run["state"] == "finished"],
            }
            for name, cell in cells.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: not a study's ({error!r}); choose another out, or remove the file") from None


def write(progress: Progress) -> None:
    """Write all files of a study, each whole; scale.json first."""
    folder = progress.study.folder
    write_json(folder / JSON_FILE, as_json(progress))
    write_atomic(folder / "scale.csv", as_csv(progress).encode())
    write_atomic(folder / "scale.md", as_markdown(progress).encode())


def as_json(progress: Progress) -> dict[str, Any]:
    """Return everything but the steps, as JSON has it."""
    study = progress.study
    runs: dict[str, dict[str, Any]] = {cell: {} for cell in study.cells}
    for run in study.runs:
        runs[run.cell][str(run.seed)] = _state(progress, run)
    return {
        "budgets": [dataclasses.asdict(budget) for budget in study.budgets],
        "versions": machine.versions(),
        "cells": {
            cell: {
                "values": dict(values),
                "settings": dict(progress.settings[cell]),
                "stage_1": dataclasses.asdict(progress.stage_1[cell]) if cell in progress.stage_1 else None,
                "runs": runs[cell],
            }
            for cell, values in study.cells.items()
        },
    }


def _state(progress: Progress, run: Run) -> dict[str, Any]:
    if (course := progress.courses.get(run)) is None:
        return unfinished.state_of(run, progress.errors)
    scores = [dataclasses.asdict(score) for score in course if score.score is not None]
    return {"state": "finished", "spent": dataclasses.asdict(course[-1].spent), "scores": scores}


def as_csv(progress: Progress) -> str:
    """Return the courses of the finished runs, which `astar scale fit` reads, with the values of each cell's keys."""
    keys = list(dict.fromkeys(key for values in progress.study.cells.values() for key in values))
    rows = []
    for run, course in progress.courses.items():
        values = progress.study.cells[run.cell]
        for score in course:
            spent = (score.spent.tokens, score.spent.flops, score.spent.seconds)
            own = (score.reward_mean, score.score, *(values.get(key) for key in keys))
            rows.append((run.cell, run.seed, score.steps, *spent, *own))
    return csv_text((*_COLUMNS, *keys), rows)


def as_markdown(progress: Progress) -> str:
    """Return a table of the cells with their score at each budget."""
    study = progress.study
    columns = [f"{budget.amount:.4g} {UNITS[budget.measure]}" for budget in study.budgets]
    lines = [
        markdown_table(("cell", "runs", *columns), (_row(progress, cell) for cell in study.cells)),
        "",
        "Score: greedy, on the held-out problems, of the weights at which a run has cost so much, stage 1 included "
        "where the cell reads it; mean over the finished runs ± its standard error, (n) where n of them alone have "
        "one. Where stage 1 alone costs more, it is that of the weights before training, if they were evaluated.",
    ]
    lines += unfinished.listed(study.runs, progress.courses, progress.errors)
    if short := _ended_by_num_steps(progress):
        lines += ["", f"Ended by train.num_steps before the last budget was reached: {', '.join(short)}."]
    return "\n".join(lines) + "\n"


def _row(progress: Progress, cell: str) -> Sequence[Any]:
    courses = [course for run, course in progress.courses.items() if run.cell == cell]
    cells = []
    for budget in progress.study.budgets:
        scores = [score for course in courses if (score := score_at(course, budget)) is not None]
        mean, error = mean_and_error(scores) if scores else (None, None)
        text = "" if mean is None else f"{mean:.3f}" + (f" ± {error:.3f}" if len(scores) > 1 else "")
        cells.append(f"{text} ({len(scores)})" if 0 < len(scores) < len(courses) else text)
    return cell, len(courses), *cells


def score_at(course: Sequence[Score], budget: Budget) -> float | None:
    """Return the score of the weights with which a run first has cost a budget; None: they were not evaluated."""
    return next((score.score for score in course if budget.is_reached_by(score.spent)), None)


def _ended_by_num_steps(progress: Progress) -> list[str]:
    limit = progress.study.limit
    return [run.name for run, course in progress.courses.items() if not limit.is_reached_by(course[-1].spent)]
