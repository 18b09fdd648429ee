"""PROGRAM: methods side by side at equal cost, a run of `astar train` for each method and seed, one after the other.

One V* table serves all of them: it is filled first, by the seed of the configuration, where a method reads it and it
lacks something. Run again it goes on: finished runs stay, others continue from their checkpoints. Once a run is written
down as finished its checkpoints are removed; its export stays. What is compared: studies/comparison.py.
"""

from collections.abc import Sequence
from pathlib import Path

from astar_megatron.config import RunConfig
from astar_megatron.data.files import exclusive, make_folder
from astar_megatron.run import resources
from astar_megatron.run.commands import Runner, astar, run_shown
from astar_megatron.run.prepare import Inputs, prepare
from astar_megatron.run.tracking import Screen
from astar_megatron.run.training import check_before_stage_1
from astar_megatron.studies import comparison, comparison_files
from astar_megatron.studies.comparison import Result, Run
from astar_megatron.studies.comparison_files import STAGE_1, Comparison
from astar_megatron.studies.comparison_stage_1 import SharedStage1


def main(cfg: RunConfig, methods: str, budget: str, seeds: str, out: Path | None, runner: Runner = astar) -> int:
    """Compare, and write `out`, by default `<run_dir>/compare`; return 1 where a run failed, else 0."""
    folder = out or Path(cfg.run_dir) / "compare"
    limit, asked = comparison.budget_of(budget), comparison.runs_of(methods, seeds)
    before, finished = comparison_files.read(folder)
    runs = list(dict.fromkeys([*asked, *finished]))
    configs = {run: comparison.run_config(cfg, run, folder) for run in runs}
    inputs, screen = _checked([own for run, own in configs.items() if run not in finished] or [cfg], folder), Screen()
    settings = comparison.settings_of(cfg, inputs, limit)
    comparison.check_settings(folder, before, settings)
    shared = SharedStage1(limit=limit, inputs=inputs, folder=folder)
    costs = shared.known_costs(configs)
    for run, own in configs.items():
        if run.cell in costs or not own.asks_stage_1:
            comparison.with_budget(own, [limit], costs.get(run.cell))  # refused before anything is written
    make_folder(folder)
    with exclusive(folder / "compare.lock", "another comparison of this folder"):
        if comparison_files.read(folder)[1] != finished:
            raise ValueError(f"{folder}: another comparison has just gone on there; run the same command again")
        stage_1, failures = shared.fill(
            configs, cfg.seed, finished, lambda own: run_shown("sweep", own, "stage 1", screen, runner)
        )
        errors = {run: failures[run.cell] for run in runs if run.cell in failures}
        runnable = {run: own for run, own in configs.items() if run not in errors}
        configs = {run: comparison.with_budget(own, [limit], stage_1.get(run.cell)) for run, own in runnable.items()}
        known = Comparison(settings=settings, budget=limit, runs=runs, stage_1=stage_1, results={}, errors=errors)
        for run in finished:  # first, asked for or not, so that what is written never loses a finished run
            known.results[run] = _result(known, run, configs[run], folder)
        _write(known, folder)
        for method, reason in failures.items():
            screen.say(f"{method}: {reason}")
        asked = [run for run in asked if run in configs]
        for number, run in enumerate(asked, 1):
            _train(known, run, configs[run], f"{run.name}, run {number} of {len(asked)}", folder, screen, runner)
    screen.say(comparison_files.as_markdown(known))
    screen.say(f"compare.md, compare.csv, compare.json and compare.png are in {folder}")
    return 1 if known.errors else 0


def _train(
    known: Comparison, run: Run, cfg: RunConfig, label: str, folder: Path, screen: Screen, runner: Runner
) -> None:
    """Run what is not finished, and write what is known then."""
    if run in known.results:
        screen.say(f"{label}: finished before")
        return
    end = run_shown("train", cfg, label, screen, runner)
    try:
        if end.status:
            raise ValueError(end.error)
        known.results[run] = _result(known, run, cfg, folder)
    except ValueError as error:
        known.errors[run] = str(error)
        screen.say(f"{label} failed: {error}")
    _write(known, folder)


def _result(known: Comparison, run: Run, cfg: RunConfig, folder: Path) -> Result:
    return comparison.result_of(
        run, folder / run.name, known.stage_1.get(run.cell), has_reference=not cfg.copies_reference
    )


def _write(known: Comparison, folder: Path) -> None:
    comparison_files.write(folder, known)
    comparison.remove_checkpoints(folder, known.results)


def _checked(configs: Sequence[RunConfig], folder: Path) -> Inputs:
    """Return what the runs have in common. Raises ValueError for what of any method is refused without running it.

    Checkpoints are not looked at: a damaged one is its own run's failure.
    """
    by_method = {cfg.objective.name: cfg.model_copy(update={"run_dir": str(folder / STAGE_1)}) for cfg in configs}
    inputs = prepare(next(iter(by_method.values())))
    for method, cfg in by_method.items():
        try:
            resources.check_run(cfg, inputs.model)
            check_before_stage_1(cfg, inputs)
        except (ValueError, OSError) as error:
            raise ValueError(f"{method}: {error}") from error
    return inputs
