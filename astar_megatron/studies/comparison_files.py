"""What a comparison leaves: compare.json with everything, compare.csv a line a step, compare.md for people."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from astar_megatron.data.files import storage_error, write_atomic, write_json
from astar_megatron.data.table_text import csv_text, markdown_table
from astar_megatron.run import machine
from astar_megatron.run.spending import Cost
from astar_megatron.studies import unfinished
from astar_megatron.studies.comparison import METHODS, UNITS, Budget, Result, Run, Stage1Cost, Summary, summary_of
from astar_megatron.studies.curves import plot

JSON_FILE = "compare.json"
STAGE_1 = "stage-1"  # folder of the sweep
_BEFORE = {"compare.lock", STAGE_1}  # what there is before the first run
_CSV_COLUMNS = (
    *("method", "seed", "step", "spent_tokens", "spent_flops", "spent_seconds"),
    *("reward_mean", "kl_token", "entropy", "truncated"),
    *("score_before", "spent_tokens_before", "spent_flops_before", "spent_seconds_before"),  # of a step's first weights
)
_COLUMNS = ("method", "runs", "score", "KL", "seconds", "peak memory, GiB", "tokens", "FLOPs", "steps")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What is known of a comparison by now."""

    settings: Mapping[str, Any]
    budget: Budget
    runs: Sequence[Run]
    stage_1: Mapping[str, Stage1Cost]  # of the methods that read it
    results: dict[Run, Result]  # of the finished runs
    errors: dict[Run, str]  # of those that failed

    @property
    def finished(self) -> list[Result]:
        """In the order of the runs."""
        return [self.results[run] for run in self.runs if run in self.results]

    @property
    def ended_by_num_steps(self) -> list[str]:
        """Names of the finished runs that `train.num_steps` ended before they reached the budget."""
        return [result.run.name for result in self.finished if not self.budget.is_reached_by(result.spent)]

    @property
    def summaries(self) -> list[Summary]:
        """Of the methods that have a finished run, the best first."""
        methods = dict.fromkeys(run.cell for run in self.runs)
        own = [summary for method in methods if (summary := summary_of(method, self.finished))]
        return sorted(own, key=lambda summary: -summary.score)


def read(folder: Path) -> tuple[dict[str, Any], list[Run]]:
    """Return the settings of the comparison that a folder holds and its finished runs; nothing where there is none.

    Raises ValueError where the folder holds something else.
    """
    path = folder / JSON_FILE
    try:
        folder.stat()
    except FileNotFoundError:
        return {}, []
    except OSError as error:
        raise storage_error(f"{folder}: can't create the folder", error) from error
    if not folder.is_dir():
        raise ValueError(f"{folder}: is a file, and no folder of a comparison; choose another --out")
    if not path.exists():
        if {entry.name for entry in folder.iterdir()} - _BEFORE:
            raise ValueError(f"{folder}: holds files but no {JSON_FILE}, so no comparison; choose another --out")
        return {}, []
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        finished = [Run(run["method"], run["seed"]) for run in tree["runs"] if run["state"] == "finished"]
        if odd := [run for run in finished if run.cell not in METHODS or type(run.seed) is not int]:
            raise ValueError(f"no run is called {odd[0].name}")
        return dict(tree["settings"]), [run for run in finished if (folder / run.name).exists()]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: not a comparison's ({error!r}); choose another --out, or remove the file") from None


def write(folder: Path, comparison: Comparison) -> None:
    """Write all files of a comparison, each whole; compare.json first, by which a later one goes on."""
    write_json(folder / JSON_FILE, as_json(comparison))
    write_atomic(folder / "compare.csv", as_csv(comparison).encode())
    write_atomic(folder / "compare.md", as_markdown(comparison).encode())
    plot(comparison.finished, folder / "compare.png")


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Return everything but the steps, as JSON has it."""
    return {
        "budget": dataclasses.asdict(comparison.budget),
        "settings": dict(comparison.settings),
        "versions": machine.versions(),
        "stage_1": {method: dataclasses.asdict(cost) for method, cost in comparison.stage_1.items()},
        "summaries": [dataclasses.asdict(summary) for summary in comparison.summaries],
        "ended_by_num_steps": comparison.ended_by_num_steps,
        "runs": [
            {"name": run.name, "method": run.cell, "seed": run.seed} | _state(comparison, run)
            for run in comparison.runs
        ],
    }


def as_csv(comparison: Comparison) -> str:
    """Return a line a step of the finished runs."""
    rows = []
    for result in comparison.finished:
        stage_1 = comparison.stage_1.get(result.run.cell)
        before = _amounts(stage_1.known if stage_1 else Cost())
        for step in result.steps:
            score = sum(step.scores.values()) / len(step.scores) if step.scores else None
            spent = _amounts(step.spent)
            health = (step.reward_mean, step.kl_token, step.entropy, step.truncated)
            rows.append((result.run.cell, result.run.seed, step.step, *spent, *health, score, *before))
            before = spent
    return csv_text(_CSV_COLUMNS, rows)


def as_markdown(comparison: Comparison) -> str:
    """Return the table of the methods, and what has to be known to read it."""
    seeds = ", ".join(map(str, dict.fromkeys(run.seed for run in comparison.runs)))
    lines = [
        f"Budget of each run: {comparison.budget.amount:.12g} {UNITS[comparison.budget.measure]}, stage 1 included "
        f"where the method reads it. Seeds: {seeds}.",
        "",
        markdown_table(_COLUMNS, map(_row, comparison.summaries)),
        "",
        "Score: greedy, of the last weights, mean over the finished runs ± its standard error. KL: to the reference, "
        "nats a response token, at the last step; empty where it is to a copy of the policy. "
        "Memory: of the rank that has most. The rest are means over the runs.",
    ]
    for method, cost in comparison.stage_1.items():
        seconds = "seconds that are not known, and not counted" if cost.seconds is None else f"{cost.seconds:.1f} s"
        lines += ["", f"Stage 1, as {method} reads it: {cost.tokens} tokens, {cost.flops:.3g} FLOPs, {seconds}."]
    if comparison.ended_by_num_steps:
        lines += [
            "",
            f"Ended by train.num_steps before the budget was reached: {', '.join(comparison.ended_by_num_steps)}.",
        ]
    lines += unfinished.listed(comparison.runs, comparison.results, comparison.errors)
    return "\n".join(lines) + "\n"


def _amounts(spent: Cost) -> tuple[float, ...]:
    return spent.tokens, spent.flops, spent.seconds


def _row(summary: Summary) -> Sequence[str]:
    error = "" if summary.score_error is None else f" ± {summary.score_error:.3f}"
    return (
        summary.method,
        str(summary.num_runs),
        f"{summary.score:.3f}{error}",
        "" if summary.kl_token is None else f"{summary.kl_token:.4f}",
        f"{summary.seconds:.1f}",
        f"{summary.peak_memory_bytes / 2**30:.2f}",
        f"{summary.tokens:.0f}",
        f"{summary.flops:.3g}",
        f"{summary.steps:.1f}",
    )


def _state(comparison: Comparison, run: Run) -> dict[str, Any]:
    if (result := comparison.results.get(run)) is None:
        return unfinished.state_of(run, comparison.errors)
    return {
        "state": "finished",
        "score": result.score,
        "scores": dict(result.scores),
        "kl_token": result.steps[-1].kl_token,
        "spent": dataclasses.asdict(result.spent),
        "steps": len(result.steps),
        "peak_memory_bytes": result.peak_memory_bytes,
    }
