"""PROGRAM: a scaling study, one run after the other, or each as a job.

A study run again goes on: finished runs stay, others continue from their checkpoints, and cells and seeds that the file
has got since are added. Once a run is written down as finished its checkpoints are removed; its export stays. What a
study is: studies/study.py; what its scores say: the program scaling_fit.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from astar_megatron.config import RunConfig, Stage
from astar_megatron.data.files import exclusive, make_folder
from astar_megatron.launch import queue
from astar_megatron.launch.program import submits
from astar_megatron.run.commands import LOG_FILE, CommandEnd, Runner, astar, run_shown
from astar_megatron.run.prepare import Inputs
from astar_megatron.run.tracking import Screen
from astar_megatron.studies import comparison, study_files
from astar_megatron.studies.comparison import Run
from astar_megatron.studies.comparison_stage_1 import SharedStage1
from astar_megatron.studies.study import Score, Study, checked_inputs, course_of, read_study, settings_of
from astar_megatron.studies.study_files import Progress

# Runs a command for each of some configurations, by a name, and yields the name and how it ended.
type Ends = Callable[[Stage, Mapping[str, RunConfig]], Iterator[tuple[str, CommandEnd]]]


def run(file: Path, runner: Runner = astar) -> int:
    """Run the study of a file, and write what it gives to its folder; return 1 where a run failed, else 0.

    Where slurm.backend is sbatch, and this is no job, each run is a job.
    """
    (study, configs), screen = read_study(file), Screen()
    ends = _as_jobs if submits(next(iter(configs.values())).slurm) else _here(screen, runner)
    by_cell = {each.cell: cfg for each, cfg in configs.items()}
    inputs = checked_inputs(by_cell, study.folder)
    settings = {cell: settings_of(cfg, inputs[cell], study.budgets) for cell, cfg in by_cell.items()}
    for cfg in by_cell.values() if ends is _as_jobs else ():
        queue.check(cfg, "train")
    for cell, cfg in by_cell.items():
        _shared(study, inputs[cell]).known_costs({Run(cell, cfg.seed): cfg})  # or refused, unwritten
    make_folder(study.folder)
    with exclusive(study.folder / "scale.lock", "another study in this folder"):
        before = study_files.read(study.folder)
        finished = [Run(cell, seed) for cell, known in before.items() for seed in known["finished"]]
        if lost := [each.name for each in finished if each not in configs]:
            raise ValueError(f"{file}: lacks {lost[0]}, which has finished; put it back, or choose another out")
        for cell in before.keys() & settings.keys():
            comparison.check_settings(study.folder, before[cell]["settings"], settings[cell])
        progress = Progress(study=study, settings=settings, stage_1={}, courses={}, errors={})
        _stage_1(progress, configs, inputs, finished, screen, ends)
        for each in finished:  # first, so that what is written never loses a finished run
            progress.courses[each] = _course(progress, each)
        _write(progress)
        left = {each.name: (each, cfg) for each, cfg in _with_budgets(progress, configs).items()}
        for name, end in ends("train", {name: cfg for name, (_, cfg) in left.items()}):
            _note(progress, left[name][0], end, screen)
    screen.say(study_files.as_markdown(progress))
    screen.say(f"scale.md, scale.csv and scale.json are in {study.folder}; next: astar scale fit {study.folder}")
    return 1 if progress.errors else 0


def _stage_1(
    progress: Progress,
    configs: Mapping[Run, RunConfig],
    inputs: Mapping[str, Inputs],
    finished: Sequence[Run],
    screen: Screen,
    ends: Ends,
) -> None:
    """Fill the V* tables, and note what each cell reads of them, or that its runs failed because of it."""
    study = progress.study
    for cell, cell_inputs in inputs.items():
        own = {each: cfg for each, cfg in configs.items() if each.cell == cell}
        costs, failures = _shared(study, cell_inputs).fill(
            own,
            min(each.seed for each in own),
            finished,
            lambda cfg, cell=cell: next(ends("sweep", {f"stage 1 for {cell}": cfg}))[1],
        )
        progress.stage_1.update(costs)
        if reason := failures.get(cell):
            progress.errors.update(dict.fromkeys(own, reason))
            screen.say(f"{cell}: {reason}")


def _shared(study: Study, inputs: Inputs) -> SharedStage1:
    return SharedStage1(limit=study.limit, inputs=inputs, folder=study.folder)


def _with_budgets(progress: Progress, configs: Mapping[Run, RunConfig]) -> dict[Run, RunConfig]:
    """Return the runs that are left, with what stage 1 leaves of the budgets; where that is nothing, a run failed."""
    left = {}
    for run, cfg in configs.items():
        if run in progress.courses or run in progress.errors:
            continue
        try:
            left[run] = comparison.with_budget(cfg, progress.study.budgets, progress.stage_1.get(run.cell))
        except ValueError as error:
            progress.errors[run] = str(error)
    return left


def _here(screen: Screen, runner: Runner) -> Ends:
    """One after the other on this machine."""

    def ends(stage: Stage, configs: Mapping[str, RunConfig]) -> Iterator[tuple[str, CommandEnd]]:
        for number, (name, cfg) in enumerate(configs.items(), 1):
            label = f"{name}, run {number} of {len(configs)}" if stage == "train" else name
            yield name, run_shown(stage, cfg, label, screen, runner)

    return ends


def _as_jobs(stage: Stage, configs: Mapping[str, RunConfig]) -> Iterator[tuple[str, CommandEnd]]:
    """All at once as jobs of Slurm's, in the order in which they end."""
    submissions = {name: queue.submission_of(cfg, stage, Path(cfg.run_dir) / LOG_FILE) for name, cfg in configs.items()}
    for name, did_well in queue.ended(submissions):
        yield name, CommandEnd(status=0 if did_well else 1, log=submissions[name].log)


def _note(progress: Progress, run: Run, end: CommandEnd, screen: Screen) -> None:
    """Write what is known when a run has ended."""
    try:
        if end.status:
            raise ValueError(end.error)
        progress.courses[run] = _course(progress, run)
    except ValueError as error:
        progress.errors[run] = str(error)
        screen.say(f"{run.name} failed: {error}")
    _write(progress)


def _course(progress: Progress, run: Run) -> list[Score]:
    return course_of(run, progress.study.folder / run.name, progress.stage_1.get(run.cell))


def _write(progress: Progress) -> None:
    study_files.write(progress)
    comparison.remove_checkpoints(progress.study.folder, progress.courses)
