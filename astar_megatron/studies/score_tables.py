"""The rows of a table that has scores: a run's metrics, a study's or a comparison's CSV, a CSV or JSONL of others."""

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from astar_megatron.run import scores
from astar_megatron.run.spending import Cost
from astar_megatron.run.tracking import METRICS_FILE, read_metrics

type Row = Mapping[str, Any]
_OF_SEVERAL = ("scale.csv", "compare.csv")  # runs, those that failed are in the .json beside it
_MORE = "(more)"  # cells without a column


def table_file(path: Path) -> Path:
    """Return the file that is read of a source: of a folder the study's, the comparison's or the run's."""
    if not path.is_dir():
        return path
    return next((path / name for name in _OF_SEVERAL if (path / name).exists()), path / METRICS_FILE)


def asked_runs(path: Path) -> dict[str, int]:
    """Return how many runs each curve of a study's or a comparison's table was to have; {} where nothing says so.

    Raises ValueError for a damaged file.
    """
    table = table_file(path)
    record = table.with_suffix(".json")
    if table.name not in _OF_SEVERAL or not record.exists():
        return {}
    try:
        tree = json.loads(record.read_text(encoding="utf-8"))
        if "cells" in tree:
            return {name: len(cell["runs"]) for name, cell in tree["cells"].items()}
        return Counter(run["method"] for run in tree["runs"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{record}: can't read which runs {table.name} was to have: {error!r}; repair the file, or remove it"
        ) from None


def read_rows(path: Path) -> Sequence[Row]:
    """Return the rows of a source, by column; of a run's folder what it has spent before each step.

    Raises ValueError, with the file, for what is no table.
    """
    if path.is_dir() and table_file(path).name == METRICS_FILE:
        return _of_run(path)
    path = table_file(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        match path.suffix.lower():
            case ".jsonl":
                rows = _of_jsonl(text)
            case ".json":  # trainer_state.json, as transformers' trainers and TRL's leave it
                rows = json.loads(text)["log_history"]
            case _:
                rows = _of_csv(text)
    except (LookupError, TypeError):
        raise ValueError(
            f"{path}: expected a trainer_state.json, with log_history; give that, a CSV or a JSONL"
        ) from None
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file or folder; give a CSV, a JSONL or a run's folder") from None
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise ValueError(
            f"{path}: can't read the table: {error}; mend it, or give a CSV, a JSONL or a run's folder"
        ) from None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected a header and a row a step, or a JSON object a line; it has none")
    return rows


def _of_jsonl(text: str) -> list[Any]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            rows += [_unnested(json.loads(line))] if line.strip() else []
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number}, character {error.colno}: {error.msg}") from None
    return rows


def _unnested(row: Any) -> Any:
    """What verl's logger to files has below a step as `data`, beside the step."""
    if isinstance(row, dict) and row.keys() == {"step", "data"} and isinstance(row["data"], dict):
        return {"step": row["step"]} | row["data"]
    return row


def _of_csv(text: str) -> list[dict[str, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), restkey=_MORE, restval="")
    names = reader.fieldnames or []
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"it has more than one column {', '.join(sorted(twice))}: rename all but one")
    rows = list(reader)
    for number, row in enumerate(rows, 1):
        if any(row.pop(_MORE, ())):
            raise ValueError(f"row {number} has more cells than the header has columns; whose they are can't be told")
    return rows


def _of_run(path: Path) -> list[Row]:
    """What has been spent before each step with its reward and its weights' score.

    Of stage 1 that is the tokens, as in the lines of metrics: its FLOPs and seconds are in no run's. The scores are
    those that a study has too: also of the last weights, which no line of metrics has.
    """
    lines, rows = read_metrics(path), []
    if not lines:
        raise ValueError(f"{path}: no {METRICS_FILE} with steps, scale.csv or compare.csv there; give a run's folder")
    _check_steps([line["step"] for line in lines], path)
    first = lines[0]
    spent = Cost(tokens=max(0, (first.get("spent_tokens") or 0) - (first.get("response_tokens") or 0)))
    for line in lines:
        rows += _score(path, line["step"], spent)
        rows.append(_costs(spent) | {"reward_mean": line.get("reward_mean", "")})
        spent += Cost.of_step(line)
    return rows + _score(path, lines[-1]["step"] + 1, spent)


def _check_steps(steps: Sequence[int], path: Path) -> None:
    """Raise ValueError where lines of metrics, whose costs are added up, are not of all steps from 0 on, each once."""
    if (wrong := next((place for place, step in enumerate(steps) if step != place), None)) is not None:
        raise ValueError(
            f"{path / METRICS_FILE}, line {wrong + 1}: expected step {wrong}, got {steps[wrong]}; what steps cost "
            "is added up from 0 on; give a run with all of its steps in order, each once, as a resumed run leaves them"
        )


def _score(path: Path, steps: int, spent: Cost) -> list[Row]:
    """The row of an evaluation after so many steps; [] where there was none."""
    score = scores.mean_of_step(path, steps)
    return [] if score is None else [_costs(spent) | {"score": score}]


def _costs(spent: Cost) -> dict[str, float]:
    return {f"spent_{measure}": spent.by(measure) for measure in ("tokens", "flops", "seconds")}
