"""Runs that have failed or not run yet, as what a comparison or a study leaves tells of them."""

from collections.abc import Collection, Iterable, Mapping

from astar_megatron.studies.comparison import Run


def state_of(run: Run, errors: Mapping[Run, str]) -> dict[str, str]:
    """Return what a JSON file says of a run that has not finished."""
    return {"state": "failed", "error": errors[run]} if run in errors else {"state": "waiting"}


def listed(runs: Iterable[Run], finished: Collection[Run], errors: Mapping[Run, str]) -> list[str]:
    """Return the lines of Markdown that list the runs which have not finished, and why; none where all have."""
    lines = [f"- {run.name}: {errors.get(run, 'has not run yet')}" for run in runs if run not in finished]
    return ["", "Not finished:", "", *lines] if lines else []
