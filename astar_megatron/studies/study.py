"""A scaling study: which runs a study file asks for, and what they gave.

The file names a configuration, keys to set in all of it, grids of keys, budgets and seeds. Each point of a grid is a
cell; each cell runs once a seed, up to each budget in turn, and is evaluated there, so that all cells have scores at
equal cost. A cell that reads stage 1 pays for what it reads of it, as if it had run alone. All cells of a model share
one V* table, unless something else that it depends on is in the grid, such as the temperature.

Leaves out how runs are started (the program scaling) and what a cell and a seed have in common with a comparison's
method and seed (comparison.py).
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from astar_megatron import config
from astar_megatron.config import BudgetConfig, ConfigError, Name, RunConfig, Section
from astar_megatron.config_secrets import LOGIN_REFUSED, without_logins
from astar_megatron.data.contract import contract_of
from astar_megatron.run import scores
from astar_megatron.run.prepare import Inputs, prepare
from astar_megatron.run.spending import Cost
from astar_megatron.run.training import check_before_stage_1
from astar_megatron.studies import comparison
from astar_megatron.studies.comparison import Budget, Run, Stage1Cost
from astar_megatron.studies.comparison_files import STAGE_1

TABLES = "tables"  # folder of those of stage 1
_NAMED = {"run_dir": "out", "seed": "seeds"}  # keys of the study itself for these of a run
_OWN_KEYS = (*_NAMED, "budget", "eval.interval", "slurm.backend")  # the study's, or of all its runs
_LONGEST_NAME = 150  # of a folder


class StudyFile(Section):
    """The keys of a study file."""

    config: Name
    """Configuration of all runs."""
    set: dict[str, Any] = Field(default={})
    """Keys of the configuration with their values; `out` and `seeds` stand for `run_dir` and `seed`."""
    grid: list[dict[str, list[Any]]]
    """Grids: of each, every combination of the values of its keys is a cell."""
    budgets: list[str]
    """`flops=N` or `tokens=N`, stage 1 counted, rising: where cells are evaluated; the last ends them."""
    seeds: list[int] = Field(default=[0, 1, 2])
    """A run of each cell for each of them."""
    out: Name
    """Folder of the runs, the V* tables and the results."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """What is to be run, and the values of each cell's keys."""

    folder: Path
    budgets: Sequence[Budget]
    runs: Sequence[Run]
    cells: Mapping[str, Mapping[str, Any]]

    @property
    def limit(self) -> Budget:
        return self.budgets[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What a run had cost after so many steps, its weights' score then, and the mean reward of their own step."""

    steps: int
    spent: Cost
    reward_mean: float | None
    score: float | None  # greedy, on the held-out problems, mean over their sets


def read_study(file: Path) -> tuple[Study, dict[Run, RunConfig]]:
    """Return the study of a file, and the configuration of every run, without its budget. Raises ConfigError."""
    try:
        study = StudyFile.model_validate(config.read(file))
    except ValidationError as error:
        lines = [config.explain(problem, list(StudyFile.model_fields)) for problem in error.errors()]
        raise ConfigError(f"{file}: " + "\n".join(lines)) from None
    budgets = _budgets(study.budgets)
    if not study.seeds or len({*study.seeds}) < len(study.seeds):
        raise ConfigError(f"seeds: expected one or more, each once, got {study.seeds}")
    if own := _among(study.set, _NAMED):
        raise ConfigError(f"set: {own[0]} can't be there; the study has its own key for it, {_NAMED[own[0]]}")
    _check_logins(study)
    tree = config.read(study.config)
    cells = _cells(_points(study.grid))
    configs = {
        Run(name, seed): _run_config(tree, study, Run(name, seed), point)
        for name, point in cells.items()
        for seed in study.seeds
    }
    return Study(folder=Path(study.out), budgets=budgets, runs=list(configs), cells=cells), configs


def settings_of(cfg: RunConfig, inputs: Inputs, budgets: Sequence[Budget]) -> dict[str, Any]:
    """Return what a cell's runs have in common."""
    common = comparison.settings_of(cfg, inputs, budgets[-1])
    return {key: value for key, value in common.items() if key != "seed"} | {
        "objective.name": cfg.objective.name,
        "budgets": ", ".join(map(str, budgets)),
    }


def _check_held_out(cfg: RunConfig, inputs: Inputs) -> None:
    """Raise ValueError where a problem of the evaluation is trained on."""
    if cfg.data.eval_path is None and not cfg.eval.benchmarks:
        raise ValueError("data.eval_path: a study's scores are of problems that no run trains on; give their file")
    trained = {prompt.uid for prompt in inputs.prompts}
    for eval_set in inputs.eval_sets:
        if both := [prompt.text for prompt in eval_set.prompts if prompt.uid in trained]:
            raise ValueError(
                f"data.eval_path: {len(both)} of the {len(eval_set.prompts)} problems of {eval_set.name} are in "
                f"{cfg.data.path} too, such as {both[0]!r:.100}; take them out of it"
            )


def checked_inputs(cells: Mapping[str, RunConfig], folder: Path) -> dict[str, Inputs]:
    """Return what each cell's runs read. Raises ValueError for what is refused without running it.

    Cells of the same problems share them. Checkpoints are not looked at: a damaged one is its own run's failure.
    """
    inputs: dict[str, Inputs] = {}
    by_sections: dict[str, Inputs] = {}
    for cell, cfg in cells.items():
        own = cfg.model_copy(update={"run_dir": str(folder / STAGE_1)})
        sections = repr((own.data, own.model, own.reward, own.eval))
        try:
            inputs[cell] = prepare(own, known=by_sections.get(sections))
            _check_held_out(own, inputs[cell])
            check_before_stage_1(own, inputs[cell])
        except (ValueError, OSError) as error:
            raise ValueError(f"cell {cell}: {error}") from error
        by_sections.setdefault(sections, inputs[cell])
    return inputs


def course_of(run: Run, run_dir: Path, stage_1: Stage1Cost | None) -> list[Score]:
    """Return a finished run's rewards and scores, from the weights before its first step on. Raises ValueError."""
    steps = comparison.result_of(run, run_dir, stage_1).steps
    spent = [stage_1.known if stage_1 else Cost(), *(step.spent for step in steps)]
    rewards = [*(step.reward_mean for step in steps), None]  # of responses of the weights before the step
    return [
        Score(steps=number, spent=cost, reward_mean=reward, score=scores.mean_of_step(run_dir, number))
        for number, (cost, reward) in enumerate(zip(spent, rewards, strict=True))
    ]


def _budgets(texts: Sequence[str]) -> list[Budget]:
    budgets = [comparison.budget_of(text, "budgets", ("tokens", "flops")) for text in texts]
    amounts = [budget.amount for budget in budgets]
    if len({budget.measure for budget in budgets}) != 1 or sorted({*amounts}) != amounts:
        raise ConfigError(f"budgets: expected rising amounts, all flops=N or all tokens=N, got {texts}")
    return budgets


def _check_logins(study: StudyFile) -> None:
    """Raise ConfigError where a value has a login, before folders and messages are named by it."""
    for section, values in (("set", study.set), *(("grid", grid) for grid in study.grid)):
        for key, value in values.items():
            if any(without_logins(text) != text for text in _texts({key: value})):
                raise ConfigError(f"{section}: {key}: {LOGIN_REFUSED}")


def _texts(value: Any) -> Iterator[str]:
    """All texts in plain values, keys too."""
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    if isinstance(value, list):
        for each in value:
            yield from _texts(each)
    elif isinstance(value, str):
        yield value


def _points(grids: Sequence[Mapping[str, Sequence[Any]]]) -> list[dict[str, Any]]:
    points = []
    for grid in grids:
        for key, values in grid.items():
            own = [name for value in values for name in _among({key: value}, _OWN_KEYS)]
            if not values or own:
                key = own[0] if own else key
                raise ConfigError(f"grid: {key} can't be there, or has no value; seeds and budgets have their own keys")
        points += [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    if not points:
        raise ConfigError("grid: expected one grid or more, as in: - {optim.lr: [1e-6, 1e-5]}")
    return points


def _among(values: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """Those of the keys that the values set, also in a section that is given whole."""
    tree = config.with_values({}, values)

    def is_set(key: str) -> bool:
        place: Any = tree
        for part in key.split("."):
            if not isinstance(place, Mapping) or part not in place:
                return False
            place = place[part]
        return True

    return [key for key in keys if is_set(key)]


def _cells(points: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The points by their cell's name, with as many of the last parts of paths as tell them all apart."""
    texts = [value for point in points for value in point.values() if isinstance(value, str)]
    both, deepest = [], max((len(Path(text).parts) for text in texts), default=1)
    for parts in range(1, max(1, deepest) + 1):
        cells: dict[str, Mapping[str, Any]] = {}
        both = [
            f"{cells[name]} and {point} would both be called {name}"
            for point in points
            if cells.setdefault(name := _name(point, parts), point) != point
        ]
        if not both:
            return cells
    raise ConfigError(f"grid: {both[0]}; rename a file or a folder")


def _name(point: Mapping[str, Any], parts: int) -> str:
    """The cell's name, also of its folders: the last part of each key, or all of it where that is not enough."""
    short = [key.rpartition(".")[2] for key in point]
    keys = short if len({*short}) == len(short) else list(point)
    values = ("/".join(Path(value).parts[-parts:]) if isinstance(value, str) else value for value in point.values())
    name = ",".join(f"{key}={value}" for key, value in zip(keys, values, strict=True))
    return re.sub(r"[^\w.,=+-]", "_", name)[:_LONGEST_NAME] or "all"


def _run_config(tree: Mapping[str, Any], study: StudyFile, run: Run, point: Mapping[str, Any]) -> RunConfig:
    """The run's configuration. Raises ConfigError, naming the cell, for one that can't be."""
    try:
        cfg = config.validate(config.with_values(tree, {**study.set, **point}))
        if cfg.budget != BudgetConfig():
            raise ConfigError("budget: a study takes it from its own key budgets; leave the keys out")
        table = cfg.sweep.table or str(Path(study.out) / TABLES / contract_of(cfg).digest()[:16])
        own = {
            "run_dir": str(Path(study.out) / run.name),
            "seed": run.seed,
            "sweep.table": table,
            "eval.interval": cfg.eval.interval or cfg.train.num_steps,
        }
        return config.validate(config.with_values(cfg.model_dump(), own))
    except ValueError as error:
        raise ConfigError(f"cell {run.cell}: {error}") from error
