"""PROGRAM: scaling laws. `run`: a study, run by run, one after the other; `fit`: what scores by compute say.

A study run again goes on: finished runs stay, others continue from their checkpoints, and cells and seeds that the file
has got since are added. Once a run is written down as finished its checkpoints are removed; its export stays. What a
study is: run/study.py; the laws: run/laws.py.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from astar_megatron.config import RunConfig
from astar_megatron.data.files import exclusive, make_folder
from astar_megatron.run import comparison, extrapolation_files, study_files
from astar_megatron.run.checkpoints import CHECKPOINTS_FOLDER
from astar_megatron.run.commands import Runner, astar, run_shown
from astar_megatron.run.comparison import Run
from astar_megatron.run.comparison_files import STAGE_1
from astar_megatron.run.comparison_stage_1 import stage_1_of
from astar_megatron.run.extrapolation import extrapolate
from astar_megatron.run.prepare import Inputs, prepare
from astar_megatron.run.score_tables import read_curves
from astar_megatron.run.study import Score, budgets_left, check_held_out, course_of, read_study, settings_of
from astar_megatron.run.study_files import Progress
from astar_megatron.run.tracking import Screen
from astar_megatron.run.training import check_before_stage_1


def run(file: Path, runner: Runner = astar) -> int:
    """Run the study of a file, and write what it gives to its folder; return 1 where a run failed, else 0."""
    (study, configs), screen = read_study(file), Screen()
    by_cell = {each.cell: cfg for each, cfg in configs.items()}
    inputs = {cell: _checked(cell, cfg, study.folder) for cell, cfg in by_cell.items()}
    settings = {cell: settings_of(cfg, inputs[cell], study.budgets) for cell, cfg in by_cell.items()}
    make_folder(study.folder)
    with exclusive(study.folder / "scale.lock", "another study in this folder"):
        before = study_files.read(study.folder)
        finished = [Run(cell, seed) for cell, known in before.items() for seed in known["finished"]]
        if lost := [each.name for each in finished if each not in configs]:
            raise ValueError(f"{file}: lacks {lost[0]}, which has finished; put it back, or choose another out")
        for cell in before.keys() & settings.keys():
            comparison.check_settings(study.folder, before[cell]["settings"], settings[cell])
        progress = Progress(study=study, settings=settings, stage_1={}, courses={}, errors={})
        _stage_1(progress, configs, inputs, finished, screen, runner)
        for each in finished:  # first, so that what is written never loses a finished run
            progress.courses[each] = _course(progress, each)
        _write(progress)
        for number, (each, cfg) in enumerate(configs.items(), 1):
            if each not in progress.courses and each not in progress.errors:
                _train(progress, each, cfg, f"{each.name}, run {number} of {len(configs)}", screen, runner)
    screen.say(study_files.as_markdown(progress))
    screen.say(f"scale.md, scale.csv and scale.json are in {study.folder}; next: astar scale fit {study.folder}")
    return 1 if progress.errors else 0


def _stage_1(
    progress: Progress,
    configs: Mapping[Run, RunConfig],
    inputs: Mapping[str, Inputs],
    finished: Sequence[Run],
    screen: Screen,
    runner: Runner,
) -> None:
    """Fill the V* tables, and note what each cell reads of them, or that its runs failed because of it."""
    study = progress.study
    for cell, cell_inputs in inputs.items():
        own = {each: cfg for each, cfg in configs.items() if each.cell == cell}
        costs, failures = stage_1_of(
            min(each.seed for each in own),
            own,
            study.limit,
            cell_inputs,
            study.folder,
            lambda cfg, cell=cell: run_shown("sweep", cfg, f"stage 1 for {cell}", screen, runner),
        )
        progress.stage_1.update(costs)
        if reason := failures.get(cell):
            if lost := [each.name for each in finished if each.cell == cell]:
                raise ValueError(f"{reason} {lost[0]} has finished, and what it cost is not known")
            progress.errors.update(dict.fromkeys(own, reason))
            screen.say(f"{cell}: {reason}")


def _train(progress: Progress, run: Run, cfg: RunConfig, label: str, screen: Screen, runner: Runner) -> None:
    """Train up to each budget that is left, and write what is known then."""
    study, stage_1 = progress.study, progress.stage_1.get(run.cell)
    try:
        comparison.with_budget(cfg, study.limit, stage_1)  # refused where stage 1 leaves nothing of the last
        for budget in budgets_left(Path(cfg.run_dir), study.budgets, stage_1, cfg.train.num_steps):
            own = comparison.with_budget(cfg, budget, stage_1)
            end = run_shown("train", own, f"{label}, to {budget}", screen, runner)
            if end.status:
                raise ValueError(end.error)
        progress.courses[run] = _course(progress, run)
    except ValueError as error:
        progress.errors[run] = str(error)
        screen.say(f"{label} failed: {error}")
    _write(progress)


def _course(progress: Progress, run: Run) -> list[Score]:
    return course_of(run, progress.study.folder / run.name, progress.stage_1.get(run.cell))


def _write(progress: Progress) -> None:
    """Write what is known; then remove what only a run that goes on needs."""
    study_files.write(progress)
    for run in progress.courses:
        shutil.rmtree(progress.study.folder / run.name / CHECKPOINTS_FOLDER, ignore_errors=True)


def _checked(cell: str, cfg: RunConfig, folder: Path) -> Inputs:
    """Return what the cell's runs read. Raises ValueError for what is refused without running it.

    Checkpoints are not looked at: a damaged one is its own run's failure.
    """
    own = cfg.model_copy(update={"run_dir": str(folder / STAGE_1)})
    try:
        inputs = prepare(own)
        check_held_out(own, inputs)
        check_before_stage_1(own, inputs)
    except (ValueError, OSError) as error:
        raise ValueError(f"cell {cell}: {error}") from error
    return inputs


def fit(
    sources: Sequence[str], out: Path, compute: str | None, score: str | None, *, per_row: bool, tolerance: float
) -> None:
    """Fit the laws to runs and tables, and write what they say to `out`."""
    curves, screen = read_curves(sources, compute, score, per_row=per_row), Screen()
    results = [extrapolate(curve.name, curve.points, tolerance) for curve in curves]
    extrapolation_files.write(out, curves, results, tolerance)
    screen.say(extrapolation_files.as_markdown(curves, results, tolerance))
    screen.say(f"fit.md, fit.csv, fit.json and fit.png are in {out}")
