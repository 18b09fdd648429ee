"""Methods side by side at equal cost: which runs that takes, and what they gave.

Every run has the same configuration but for its method, seed, folder, the budget that stage 1 leaves it and an
evaluation of its last weights. A method that reads stage 1 pays for all of it in each run, as if it had run alone.

The final score of a run is that of the greedy responses to the evaluation's problems under the last weights, the mean
over its sets. What a run has cost is that of run/spending.py, and stage 1's where it reads it. Leaves out how runs are
started (the program compare) and how they are drawn (curves.py).
"""

import json
import math
import shutil
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from astar_megatron import config
from astar_megatron.algorithm.estimators import mean_and_error
from astar_megatron.config import BudgetConfig, MethodName, RunConfig
from astar_megatron.data.contract import digest_of
from astar_megatron.run import scores
from astar_megatron.run.checkpoints import CHECKPOINTS_FOLDER
from astar_megatron.run.prepare import Inputs
from astar_megatron.run.spending import Cost, Measure
from astar_megatron.run.tracking import greedy_scores, read_metrics

METHODS: tuple[str, ...] = get_args(MethodName.__value__)
UNITS: dict[Measure, str] = {"tokens": "response tokens", "flops": "model FLOPs", "seconds": "seconds"}
_MOST: dict[Measure, float] = {"tokens": 1e15, "flops": 1e30, "seconds": 1e30}  # as the keys of `budget`
_NEEDED = ("reward_mean", "truncated", "peak_memory_bytes")  # of each line of metrics
_NOT_COMMON = (
    *("run_dir", "objective.name"),  # the first says where, runs have their own of the other
    *config.NO_RESULTS,
)
_CONTENTS = ("prompts of data.path", "held-out problems", "model, tokenizer and reward")  # settings have their digests


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What each run may cost, stage 1 included where its method reads it."""

    measure: Measure
    amount: float

    def __str__(self) -> str:
        return f"{self.measure}={self.amount:.12g}"

    def is_reached_by(self, spent: Cost) -> bool:
        """Say whether a run has cost so much; it adds up from the other side, so not to the last bit."""
        return spent.by(self.measure) >= self.amount * (1 - 1e-9)


@dataclass(frozen=True, slots=True, order=True)
class Run:
    """A cell, which is a method of a comparison or a point of a study's grid, with a seed."""

    cell: str
    seed: int

    @property
    def name(self) -> str:
        """Also of its folder."""
        return f"{self.cell}-{self.seed}"


def remove_checkpoints(folder: Path, finished: Iterable[Run]) -> None:
    """Remove what only a run that goes on needs."""
    for run in finished:
        shutil.rmtree(folder / run.name / CHECKPOINTS_FOLDER, ignore_errors=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage1Cost:
    """What stage 1 cost a method that reads it. `seconds` is None where nobody measured all of it."""

    tokens: int
    flops: float
    seconds: float | None

    @property
    def known(self) -> Cost:
        """The cost, without seconds where they are not known."""
        return Cost(tokens=self.tokens, flops=self.flops, seconds=self.seconds or 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A step of a run. `spent` is the cost up to its end, stage 1's included where the method reads it."""

    step: int
    spent: Cost
    reward_mean: float
    kl_token: float | None  # KL to the reference, nats a response token
    entropy: float | None
    truncated: float
    scores: Mapping[str, float]  # greedy, by set; of the weights that the step begins with, where it evaluates them


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a finished run gave."""

    run: Run
    steps: tuple[Step, ...]
    scores: Mapping[str, float]  # greedy, by set, of the last weights
    peak_memory_bytes: int  # of the rank that has most

    @property
    def score(self) -> float:
        return statistics.fmean(self.scores.values())

    @property
    def spent(self) -> Cost:
        return self.steps[-1].spent


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The finished runs of a method: means over the seeds; the memory is the most of any."""

    method: str
    num_runs: int
    score: float
    score_error: float | None  # standard error of the mean; None for a single run
    kl_token: float | None  # at the last step
    seconds: float
    flops: float
    tokens: float
    steps: float
    peak_memory_bytes: int


def budget_of(text: str, name: str = "--budget", measures: Iterable[Measure] = UNITS) -> Budget:
    """Return the budget of a text as `tokens=N`, of a known measure. Raises ValueError; `name` is where it stands."""
    given, _, number = text.partition("=")
    known: dict[str, Measure] = {measure: measure for measure in measures}
    measure = known.get(given)
    try:
        amount = float(number)
    except ValueError:
        amount = math.nan
    if measure is None or not (0 < amount <= _MOST[measure]) or (measure == "tokens" and amount % 1):
        raise ValueError(
            f"{name}: expected {' or '.join(f'{each}=N' for each in measures)} with N above 0 (tokens: a whole number "
            f"up to 1e15, else up to 1e30), got {text!r:.80}"
        )
    return Budget(measure=measure, amount=amount)


def runs_of(methods: str, seeds: str) -> list[Run]:
    """Return the runs of comma-separated methods and seeds, method by method. Raises ValueError."""
    names, numbers = _separated(methods), _separated(seeds)
    if not names:
        raise ValueError(f"--methods: expected one method or more of {', '.join(METHODS)}, got none")
    if unknown := [name for name in names if name not in METHODS]:
        raise ValueError(f"--methods: no method {', '.join(unknown)}; there are {', '.join(METHODS)}")
    if not numbers or not all(number.isascii() and number.isdigit() and len(number) < 11 for number in numbers):
        raise ValueError(
            f"--seeds: expected one whole number or more below 2**32, separated by commas, got {seeds!r:.80}"
        )
    numbers = [str(int(number)) for number in numbers]  # 01 is 1
    for option, given in (("--methods", names), ("--seeds", numbers)):
        if twice := sorted({text for text in given if given.count(text) > 1}):
            raise ValueError(f"{option}: {', '.join(twice)} more than once; name each once")
    return [Run(name, int(seed)) for name in names for seed in numbers]


def run_config(cfg: RunConfig, run: Run, folder: Path) -> RunConfig:
    """Return the configuration of a run, without its budget. Raises ConfigError where its method can't have it."""
    if cfg.budget != BudgetConfig():
        raise ValueError("budget: a comparison takes it from --budget; leave the keys out")
    own = {
        "run_dir": str(folder / run.name),
        "seed": run.seed,
        "objective.name": run.cell,
        "sweep.table": str(cfg.table_dir),
        "eval.interval": cfg.eval.interval or cfg.train.num_steps,
    }
    return config.validate(config.with_values(cfg.model_dump(), own))


def with_budget(cfg: RunConfig, budgets: Sequence[Budget], stage_1: Stage1Cost | None) -> RunConfig:
    """Return the configuration with what stage 1, None where the run does not read it, leaves of rising budgets.

    Raises ValueError where that is nothing of the last, or where seconds count and those of stage 1 are not known.
    """
    budget = budgets[-1]
    if stage_1:
        check_seconds(cfg, budget, stage_1.seconds)
    before = stage_1.known.by(budget.measure) if stage_1 else 0
    if before >= budget.amount:
        raise ValueError(
            f"budget: {budget}, but stage 1 alone, which {cfg.objective.name} reads, costs {before:.12g} "
            f"{UNITS[budget.measure]}; give more, lower sweep.num_samples, or leave the method out"
        )
    left = [each.amount - before for each in budgets if each.amount > before]
    amounts = [int(amount) for amount in left] if budget.measure == "tokens" else left
    return config.validate(cfg.model_dump() | {"budget": {budget.measure: amounts}})


def check_least(cfg: RunConfig, budget: Budget, least: Cost) -> None:
    """Raise ValueError where stage 1, which costs `least` at least, takes all of the budget."""
    amount = least.by(budget.measure)
    if amount >= budget.amount:
        raise ValueError(
            f"budget: {budget}, but stage 1 alone, which {cfg.objective.name} reads, will cost {amount:.12g} "
            f"{UNITS[budget.measure]} or more; give more, lower sweep.num_samples, or leave the method out"
        )


def check_seconds(cfg: RunConfig, budget: Budget, stage_1_seconds: float | None) -> None:
    """Raise ValueError where seconds are to be equal and those of stage 1 are not known."""
    if budget.measure == "seconds" and stage_1_seconds is None:
        raise ValueError(
            f"budget: {budget}, but how long stage 1, which {cfg.objective.name} reads, took is not known: its table "
            f"{cfg.table_dir} was not filled by this comparison alone; set sweep.table to a new folder, which it fills "
            "and times, or give tokens or flops"
        )


def settings_of(cfg: RunConfig, inputs: Inputs, budget: Budget) -> dict[str, Any]:
    """Return what all runs of a comparison have in common, one value a key path, as JSON has it.

    With digests of what the files hold that it names: a file may change under its name.
    """
    settings = config.flat(cfg) | {"sweep.table": str(cfg.table_dir)}
    common = {key: value for key, value in settings.items() if not key.startswith(_NOT_COMMON)}
    held_out = {eval_set.name: sorted(prompt.uid for prompt in eval_set.prompts) for eval_set in inputs.eval_sets}
    contents = (sorted(prompt.uid for prompt in inputs.prompts), held_out, inputs.contract.fields())
    digests = {name: digest_of(content) for name, content in zip(_CONTENTS, contents, strict=True)}
    return json.loads(json.dumps(common | digests | {"--budget": str(budget)}))


def check_settings(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ValueError, field by field, where a folder holds a comparison of other settings."""
    changed = [f"{key}: {was} there, {now[key]} now" for key, was in config.changes(before, now).items()]
    changed += [
        f"{key}: not known there, an older version wrote it and alone can go on with it"
        for key in (_CONTENTS if before else ())
        if key not in before
    ]
    if changed:
        raise ValueError(
            f"{folder}: holds another comparison; choose another --out, or restore the settings\n  "
            + "\n  ".join(changed)
        )


def result_of(run: Run, run_dir: Path, stage_1: Stage1Cost | None, *, has_reference: bool = True) -> Result:
    """Return what a finished run has written. Raises ValueError where something of it is not there.

    Without `has_reference` the run's KL is to something else, and is left out.
    """
    lines = read_metrics(run_dir)
    if not lines:
        raise ValueError(
            f"{run_dir}: a finished run without metrics; remove the folder, and the same command runs it again"
        )
    lacking = [key for line in lines for key in _NEEDED if line.get(key) is None]
    if lacking:
        raise ValueError(
            f"{run_dir}: metrics of a finished run without {lacking[0]}; remove the folder, and the same command runs "
            "it again"
        )
    spent = stage_1.known if stage_1 else Cost()
    steps = []
    for line in lines:
        spent += Cost.of_step(line)
        step = Step(
            step=line["step"],
            spent=spent,
            reward_mean=line["reward_mean"],
            kl_token=line.get("kl_token") if has_reference else None,
            entropy=line.get("entropy"),
            truncated=line["truncated"],
            scores=greedy_scores(line),
        )
        steps.append(step)
    return Result(
        run=run,
        steps=tuple(steps),
        scores=_last_scores(run_dir, steps[-1].step + 1),
        peak_memory_bytes=max(size for line in lines for size in line["peak_memory_bytes"]),
    )


def summary_of(method: str, results: Iterable[Result]) -> Summary | None:
    """Return what the finished runs of a method gave; None where it has none."""
    own = [result for result in results if result.run.cell == method]
    if not own:
        return None
    score, error = mean_and_error([result.score for result in own])
    kl = [value for result in own if (value := result.steps[-1].kl_token) is not None]
    return Summary(
        method=method,
        num_runs=len(own),
        score=score,
        score_error=None if math.isnan(error) else error,
        kl_token=statistics.fmean(kl) if len(kl) == len(own) else None,
        seconds=statistics.fmean(result.spent.seconds for result in own),
        flops=statistics.fmean(result.spent.flops for result in own),
        tokens=statistics.fmean(result.spent.tokens for result in own),
        steps=statistics.fmean(len(result.steps) for result in own),
        peak_memory_bytes=max(result.peak_memory_bytes for result in own),
    )


def _separated(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _last_scores(run_dir: Path, steps: int) -> dict[str, float]:
    """The greedy scores by set of the weights after so many steps."""
    if not (evaluations := scores.of_step(run_dir, steps)):
        raise ValueError(
            f"{run_dir}: no {scores.name_of_step(steps)}.json of the last weights; remove the folder, and the same "
            "command runs it again"
        )
    return {evaluation.name: evaluation.greedy.mean for evaluation in evaluations}
