"""Which columns of a table are compute and score, and which of its rows are one run.

Known are the tables of a study, a comparison, a run, verl, NeMo-RL and TRL, and the CSV that W&B writes of a chart:
"RUN - METRIC" columns beside that of its axis. Any other columns can be named.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from astar_megatron.studies.score_tables import Row, read_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Which columns are read. `per_row`: the compute is a row's own, and is added up; of a known trainer a step's."""

    compute: str
    score: str
    per_row: bool = False
    curve: str | None = None  # where a table has several curves
    run: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The rows of a run, in a table that may have several, and the name of the curve that it belongs to."""

    curve: str
    columns: Columns
    rows: Sequence[Row]


_KINDS = (
    Columns(compute="spent_flops", score="score", curve="cell", run="seed"),  # of astar scale run
    Columns(compute="spent_flops_before", score="reward_mean", curve="method", run="seed"),  # of astar compare
    Columns(compute="spent_flops", score="reward_mean", curve="method", run="seed"),  # of an older version's
    Columns(compute="spent_flops", score="reward_mean"),  # of a run's folder
    Columns(compute="perf/total_num_tokens", score="critic/score/mean", per_row=True),  # verl
    Columns(compute="train/total_num_tokens", score="train/reward", per_row=True),  # NeMo-RL
    Columns(compute="train/num_tokens", score="train/reward"),  # TRL, by W&B
    Columns(compute="num_tokens", score="reward"),  # TRL, its own
)
_SPENT_AFTER = ("spent_tokens", "spent_flops", "spent_seconds")  # a step, of a comparison
_OF_FIRST_WEIGHTS = ("score_before", "reward_mean")  # of a comparison's step
OF_A_STEP = frozenset(kind.compute for kind in _KINDS if kind.per_row)
_NO_COMPUTE = re.compile(r"(.*[/_])?[Ss]tep|(Wall|Relative) Time.*")  # axes that W&B offers
_CHART = re.compile(r"(?P<run>.+) - (?P<metric>.+?)(?P<bound>__MIN|__MAX)?")


def runs_of_table(path: Path, name: str | None, compute: str | None, score: str | None, *, per_row: bool) -> list[Run]:
    """Return the runs of a source; `name`, `compute` and `score` are those that a user gives.

    A table that says itself which curves it has keeps them apart under a given name. Raises ValueError, with the
    columns that are there, where none are known.
    """
    rows = read_rows(path)
    names = list(dict.fromkeys(key for row in rows for key in row))
    columns = _columns(names, compute, score, per_row=per_row)
    if columns is None:
        runs_of_chart = _of_chart(rows, names, compute, score)
        if not runs_of_chart:
            raise _unknown(path, names, compute, score)
        if per_row or runs_of_chart[0].columns.compute in OF_A_STEP:
            raise ValueError(f"{path}: compute of single steps can't be added up over a chart; give a row a step")
        axis = runs_of_chart[0].columns.compute
        if compute is None and _NO_COMPUTE.fullmatch(axis):
            raise ValueError(
                f"{path}: its runs are drawn over {axis}, which is no compute; export the chart over what counts it, "
                f"as train/num_tokens, or give --compute '{axis}' to fit over that"
            )
        return [replace(run, curve=name or run.curve) for run in runs_of_chart]
    if columns.curve is None:
        own_name = path.name or path.resolve().name if path.is_dir() else path.stem
        return [Run(curve=name or own_name, columns=columns, rows=rows)]
    runs: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        runs.setdefault((str(row.get(columns.curve)), str(row.get(columns.run or columns.curve))), []).append(row)
    return [Run(curve=curve_name(name, curve), columns=columns, rows=own) for (curve, _), own in runs.items()]


def curve_name(name: str | None, curve: str) -> str:
    """Return what a curve of a table that has several is called, with the name that a user gives the table."""
    return f"{name}: {curve}" if name else curve


def _of_chart(rows: Sequence[Row], names: Sequence[str], compute: str | None, score: str | None) -> list[Run]:
    """The runs of a chart, none where the table is no chart: one column is its axis, all others are of runs.

    Of W&B's own metrics, as `_step`, only the one that is named is read.
    """
    axes = [name for name in names if not _CHART.fullmatch(name)]
    if len(axes) != 1 or compute not in (None, axes[0]):
        return []
    runs: list[Run] = []
    for match in filter(None, map(_CHART.fullmatch, names)):
        metric = match["metric"]
        if not match["bound"] and (metric == score or (score is None and not metric.startswith("_"))):
            own = [{axes[0]: row.get(axes[0], ""), metric: row.get(match[0], "")} for row in rows]
            runs.append(Run(curve=match["run"], columns=Columns(compute=axes[0], score=metric), rows=own))
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
    before = f"{own_compute}_before"
    has_step = own_compute in _SPENT_AFTER and (own_score == "score_before" or before in names)
    if has_step and own_score in _OF_FIRST_WEIGHTS:
        lacking = (
            ", which this compare.csv of an older version lacks: fit its runs' folders, --score score, whose FLOPs "
        )
        lacking += "and seconds have no stage 1"
        raise ValueError(
            f"--score {own_score}: is of the weights before a step, and {own_compute} has the step too; add --compute "
            f"{before}{'' if before in names else lacking}"
        )
    return Columns(
        compute=own_compute,
        score=own_score,
        per_row=per_row or own_compute in OF_A_STEP,
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
