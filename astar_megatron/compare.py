"""PROGRAM: methods side by side at equal cost, a run of `astar train` for each method and seed, one after the other.

One V* table serves all of them: it is filled first, by the seed of the configuration, where a method reads it and it
lacks something. Run again it goes on: finished runs stay, others continue from their checkpoints. A finished run's
checkpoints are removed, its export stays. What is compared: run/comparison.py.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

from astar_megatron.config import RunConfig
from astar_megatron.data.allocation import run_estimates, samples_wanted
from astar_megatron.data.files import exclusive, make_folder
from astar_megatron.data.v_star import VStarTable
from astar_megatron.run import comparison, comparison_files
from astar_megatron.run.commands import LOG_FILE, End, Runner, astar, last_line, run_command
from astar_megatron.run.comparison import Budget, Run, Stage1Cost
from astar_megatron.run.comparison_files import STAGE_1, Comparison
from astar_megatron.run.prepare import Inputs, prepare
from astar_megatron.run.spending import generation_flops
from astar_megatron.run.tracking import Screen, read_stage_1_seconds
from astar_megatron.run.training import asks_stage_1

_SECONDS_A_LINE = 60.0  # of waiting, where there is no terminal


def main(cfg: RunConfig, methods: str, budget: str, seeds: str, out: Path | None, runner: Runner = astar) -> int:
    """Compare, and write `out`, by default `<run_dir>/compare`; return 1 where a run failed, else 0."""
    folder = out or Path(cfg.run_dir) / "compare"
    limit, asked = comparison.budget_of(budget), comparison.runs_of(methods, seeds)
    settings = comparison.settings_of(cfg, limit)
    before, finished = comparison_files.read(folder)
    comparison.check_settings(folder, before, settings)
    runs = list(dict.fromkeys([*asked, *finished]))
    configs = {run: comparison.run_config(cfg, run, folder) for run in runs}
    inputs, screen = prepare(configs[asked[0]]), Screen()
    make_folder(folder)
    with exclusive(folder / "compare.lock", "another comparison of this folder"):
        stage_1 = _stage_1(cfg.seed, configs, limit, inputs, folder, screen, runner)
        configs = {run: comparison.with_budget(own, limit, stage_1.get(run.method)) for run, own in configs.items()}
        known = Comparison(settings=settings, budget=limit, runs=runs, stage_1=stage_1, results={}, errors={})
        for run in finished:  # first, asked for or not, so that what is written never loses a finished run
            _take(known, run, folder)
        comparison_files.write(folder, known)
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
    end = _run("train", cfg, label, screen, runner)
    try:
        if end.status:
            raise ValueError(end.error)
        _take(known, run, folder)
    except ValueError as error:
        known.errors[run] = str(error)
        screen.say(f"{label} failed: {error}")
    comparison_files.write(folder, known)


def _run(name: str, cfg: RunConfig, label: str, screen: Screen, runner: Runner) -> End:
    log = Path(cfg.run_dir) / LOG_FILE
    with screen.waiting(f"{label}, log in {log}", lambda: last_line(log), _SECONDS_A_LINE):
        return run_command(name, cfg, runner)


def _take(known: Comparison, run: Run, folder: Path) -> None:
    known.results[run] = comparison.result_of(run, folder / run.name, known.stage_1.get(run.method))
    shutil.rmtree(folder / run.name / "checkpoints", ignore_errors=True)


def _stage_1(
    seed: int,
    configs: Mapping[Run, RunConfig],
    limit: Budget,
    inputs: Inputs,
    folder: Path,
    screen: Screen,
    runner: Runner,
) -> dict[str, Stage1Cost]:
    """Fill the V* table as each method reads it, and return what that cost, by method; nothing of one that does not."""
    costs = {}
    for method, cfg in {run.method: cfg for run, cfg in configs.items() if asks_stage_1(cfg)}.items():
        there, lacking = _samples(cfg, inputs)
        if lacking:
            comparison.check_seconds(cfg, limit, read_stage_1_seconds(folder / STAGE_1, cfg.table_dir, there))
            own = cfg.model_copy(update={"run_dir": str(folder / STAGE_1), "seed": seed})
            end = _run("sweep", own, "stage 1", screen, runner)
            if end.status:
                raise ValueError(f"stage 1 failed: {end.error}; run the same command again: it keeps what was drawn")
            there, lacking = _samples(cfg, inputs)
        if lacking:
            raise ValueError(
                f"stage 1: {lacking} samples could not be scored, see {folder / STAGE_1}/reward_failures.jsonl; "
                "run the same command again: it draws them anew"
            )
        costs[method] = _cost(cfg, inputs, folder)
    return costs


def _samples(cfg: RunConfig, inputs: Inputs) -> tuple[int, int]:
    """Return how many of the samples that the method reads the table has, and how many it lacks."""
    table = VStarTable.create_or_open(cfg.table_dir, inputs.contract)
    wanted = samples_wanted(table, inputs.prompts, cfg.sweep, cfg.beta1)
    lacking = int(table.lacking(inputs.prompts, wanted).sum())
    return int(wanted.sum()) - lacking, lacking


def _cost(cfg: RunConfig, inputs: Inputs, folder: Path) -> Stage1Cost:
    """Return the cost of the samples that the method takes of the table."""
    estimates = run_estimates(cfg, inputs.contract, inputs.prompts)
    wanted, prompts = estimates.samples_by_uid(), {prompt.uid: prompt for prompt in inputs.prompts}
    responses = VStarTable.open(cfg.table_dir, inputs.contract).responses()
    drawn = {(uid, sample): tokens for uid, sample, tokens in responses if sample < wanted.get(uid, 0)}
    return Stage1Cost(
        tokens=int(estimates.tokens.sum()),
        flops=generation_flops(inputs.model, ((prompts[uid], tokens) for (uid, _), tokens in drawn.items())),
        seconds=read_stage_1_seconds(folder / STAGE_1, cfg.table_dir, int(estimates.samples.sum())),
    )
