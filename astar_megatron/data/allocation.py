"""How many samples each prompt gets: `sweep.num_samples`, and more where V* is least known, within a token budget.

Prompts with the widest intervals of V* get as many samples again as they have, in rounds. A round may cost half of
what is left of the budget, by an estimate: a prompt's mean response so far, or the mean of all where that is longer (a
few short ones say little of a heavy tail). What it did cost is taken off before the next, and with nothing left there
is none: so the budget is exceeded by the last round at most. Which prompts is a function of the finished rounds' rows
alone, so every job and every resumed sweep comes to the same answer, and training uses the same samples.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from astar_megatron.algorithm.methods import Stage1
from astar_megatron.config import RunConfig, SweepConfig
from astar_megatron.data.contract import Contract
from astar_megatron.data.estimates import Estimates
from astar_megatron.data.v_star import MissingTableError, VStarTable
from astar_megatron.types import Prompt

_LOG = logging.getLogger(__name__)


def samples_wanted(table: VStarTable, prompts: Sequence[Prompt], cfg: SweepConfig, beta1: float) -> np.ndarray:
    """Return [P] int64: how many samples of each prompt belong to the table, as far as its rows tell by now.

    While the table lacks some of these, they are what is to be drawn next.
    """
    wanted = np.full(len(prompts), cfg.num_samples, dtype=np.int64)
    if not (cfg.extra_tokens and len(prompts)):
        return wanted
    first = None
    while not table.lacking(prompts, wanted).any():
        estimates = table.estimate(beta1, prompts, wanted)
        first = estimates.tokens if first is None else first
        left = cfg.extra_tokens - int((estimates.tokens - first).sum())
        cost = np.maximum(estimates.tokens, np.ceil(wanted * (estimates.tokens.sum() / wanted.sum())))
        more = widest(estimates.width, cost, left // 2)
        if not more.any():
            break
        wanted = wanted + np.where(more, wanted, 0)
    return wanted


def widest(width: np.ndarray, cost: np.ndarray, budget: int) -> np.ndarray:
    """Return [P] bool: the prompts of largest `width`, earlier ones first among equals, as `budget` buys.

    One that costs more than what the wider ones have left of it is passed over.
    """
    chosen = np.zeros(len(width), dtype=bool)
    order = np.argsort(-width, kind="stable")
    order = order[width[order] > 0]
    while len(order := order[cost[order] <= budget]):  # each pass takes those that fit and drops the first that doesn't
        fit = int((np.cumsum(cost[order]) <= budget).sum())
        chosen[order[:fit]] = True
        budget -= int(cost[order[:fit]].sum())
        order = order[fit + 1 :]
    return chosen


def run_estimates(cfg: RunConfig, contract: Contract, prompts: Sequence[Prompt]) -> Estimates:
    """Return V* of a run's prompts, from the samples that belong to it; logs that the table has more, where it has.

    Raises MissingTableError, ContractError.
    """
    table = VStarTable.open(cfg.table_dir, contract)
    wanted = samples_wanted(table, prompts, cfg.sweep, cfg.beta1)
    try:
        estimates = table.estimate(cfg.beta1, prompts, wanted)
    except MissingTableError as error:
        if table.lacking(prompts, np.full(len(prompts), cfg.sweep.num_samples)).any():
            raise
        raise MissingTableError(
            f"{error}. Which prompts get those of sweep.extra_tokens depends on beta1, which is {cfg.beta1:g} here: "
            "set the sweep's to use what it drew, or sweep.extra_tokens=0 to use the first of each prompt"
        ) from error
    if warning := _unused(table.sample_counts(prompts), wanted):
        _LOG.warning("%s", warning)
    if cfg.method.other_beta is None:
        return estimates
    return replace(estimates, at_beta2=table.estimate(cfg.method.other_beta, prompts, wanted).v_star)


def _unused(there: np.ndarray, used: np.ndarray) -> str | None:
    """In words that V* is of fewer samples [P] than the table holds [P]; None where it is not."""
    if not (there > used).any():
        return None
    most = there.max()
    if (there == most).all() and (used == used.max()).all():
        words = f"V* is of {used.max()} of the {most} samples a prompt that the table has"
        return f"{words}; set sweep.num_samples={most} to use all"
    words = f"V* is of {used.sum()} of the {there.sum()} samples that the table has of this run's prompts"
    return f"{words}; set sweep.num_samples and sweep.extra_tokens as for the sweep that drew them to use all"


def run_lengths(cfg: RunConfig, contract: Contract, prompts: Sequence[Prompt]) -> tuple[list[list[int]], int]:
    """Return the lengths of each prompt's responses that the table has of what belongs to a run, and how many it lacks.

    Where there is no table it lacks all. Raises TableError, ContractError.
    """
    try:
        table = VStarTable.open(cfg.table_dir, contract)
    except MissingTableError:
        return [[] for _ in prompts], cfg.sweep.num_samples * len(prompts)
    wanted = samples_wanted(table, prompts, cfg.sweep, cfg.beta1)
    return table.lengths(prompts, wanted), int(table.lacking(prompts, wanted).sum())


def stage_1_of(estimates: Estimates | None) -> Stage1:
    """Return what a method takes of the estimates of `run_estimates`; nothing of none."""
    if estimates is None:
        return Stage1()
    uids, at_beta2 = estimates.uids, estimates.at_beta2
    return Stage1(
        v_star=estimates.by_uid(),
        v_star_at_beta2={} if at_beta2 is None else dict(zip(uids, at_beta2.tolist(), strict=True)),
        samples=estimates.samples_by_uid(),
        success=dict(zip(uids, estimates.success.tolist(), strict=True)),
    )
