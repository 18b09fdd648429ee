"""Stage 1 of A*PO: N responses of the reference to every prompt, rewarded, into the V* table.

Append-only and resumable: what the table holds is not drawn again, more samples buy only the difference, and what could
not be scored is scored once more. Any number of these may run at once on one table; a killed one loses at most the rows
not yet appended, and the others draw these.
With `sweep.extra_tokens`, samples go on where V* is least known (data/allocation.py).
"""

import time
from collections.abc import Callable, Sequence
from itertools import chain

from astar_megatron.config import RunConfig
from astar_megatron.data import chat
from astar_megatron.data.allocation import samples_wanted
from astar_megatron.data.leases import Leases
from astar_megatron.data.share import Share
from astar_megatron.data.v_star import VStarTable
from astar_megatron.rollout.requests import stage_1_request
from astar_megatron.rollout.scoring import Scorer
from astar_megatron.rollout.source import Engines, RolloutSource
from astar_megatron.run.fleet import engines_of
from astar_megatron.run.prepare import Inputs, prepare
from astar_megatron.run.tracking import Tracker
from astar_megatron.run.training import check_prompts, checkpoints_of
from astar_megatron.types import Rollout

_SECONDS_A_SHARD = 60.0  # long responses go to disk before there are as many
_POLL_SECONDS = 2.0  # between looks at what other jobs have done


def main(cfg: RunConfig) -> None:
    """Draw what the table lacks; starts nothing if it lacks nothing."""
    inputs = prepare(cfg)
    tracker = Tracker(cfg.run_dir)
    if (checkpoints := checkpoints_of(cfg, inputs)).latest:  # training would refuse it after the sweep
        checkpoints.check_method()
        check_prompts(cfg, inputs)
    table = VStarTable.create_or_open(cfg.table_dir, inputs.contract)
    if table.unscored():
        score_again(cfg, inputs, table, chat.detokenizer(cfg.model.path))
    if table.lacking(inputs.prompts, samples_wanted(table, inputs.prompts, cfg.sweep, cfg.beta1)).any():
        with (
            _leases(table) as leases,
            engines_of(cfg, tracker) as engines,
        ):  # a read-only table is refused before engines
            _fill(cfg, inputs, engines, tracker, table, leases)
    show(table, tracker)


def score_again(cfg: RunConfig, inputs: Inputs, table: VStarTable, detokenize: Callable[[Sequence[int]], str]) -> None:
    """Score the responses that could not be scored: what the reward needs may be there again. Draws nothing."""
    prompts, unscored = {prompt.uid: prompt for prompt in inputs.prompts}, table.unscored()
    rollouts = [
        Rollout.given(
            prompts[row.uid],
            row.sample,
            row.token_ids,
            detokenize(row.token_ids),
            truncated=row.truncated,
            seed=row.seed,
            logprob=row.logprob,
        )
        for row in table.responses()
        if (row.uid, row.sample) in unscored and row.uid in prompts
    ]
    with Scorer(cfg.reward.model_copy(update={"max_failures": len(rollouts)})) as scorer:
        scored = [rollout for rollout in scorer.score(rollouts) if rollout.reward is not None]
    table.append(scored, text=cfg.sweep.text)


def sweep(cfg: RunConfig, inputs: Inputs, engines: Engines, tracker: Tracker) -> VStarTable:
    """Fill the run's V* table with engines that hold the reference, and return it."""
    table = VStarTable.create_or_open(cfg.table_dir, inputs.contract)
    with _leases(table) as leases:
        _fill(cfg, inputs, engines, tracker, table, leases)
    return table


def _leases(table: VStarTable) -> Leases:
    return Leases(table.folder / "leases")


def _fill(
    cfg: RunConfig, inputs: Inputs, engines: Engines, tracker: Tracker, table: VStarTable, leases: Leases
) -> None:
    """Draw this job's shares until the table lacks nothing."""
    is_said = False
    while True:
        wanted = samples_wanted(table, inputs.prompts, cfg.sweep, cfg.beta1)
        share = Share(table, inputs.prompts, wanted, leases)
        if not share.lacking:
            return
        if not _draw(cfg, inputs, engines, tracker, table, share):
            if not is_said:
                tracker.say(f"stage 1: waiting for other jobs, which draw {share.lacking} samples")
            is_said = True  # once: it is looked every few seconds
            time.sleep(_POLL_SECONDS)
        table.refresh()


def _draw(cfg: RunConfig, inputs: Inputs, engines: Engines, tracker: Tracker, table: VStarTable, share: Share) -> int:
    """Draw this job's share, all it can get, and return how many rows that were."""
    taken = share.take()
    if (first := next(taken, None)) is None:
        return 0
    requests = (stage_1_request(cfg.seed, prompt, sample) for prompt, sample in chain([first], taken))
    waiting: list[Rollout] = []
    drawn, written = 0, time.monotonic()
    rows_a_shard = 2 * cfg.rollout.max_num_seqs * cfg.rollout.num_engines  # as many as are in flight

    def append() -> None:
        nonlocal written
        table.append(waiting, text=cfg.sweep.text)
        share.appended(waiting)
        now = time.monotonic()
        if waiting:
            tokens = sum(len(rollout.token_ids) for rollout in waiting)
            tracker.log_stage_1(table.folder, len(waiting), tokens, now - written)
        waiting.clear()
        written = now

    progress = tracker.progress("stage 1, V* sweep", share.lacking)
    with progress as advance, RolloutSource(engines, cfg.sampling, cfg.reward, tracker.run_dir) as source:
        try:
            for rollouts in source.stream(requests):
                waiting += rollouts
                drawn += len(rollouts)
                advance(len(rollouts))
                if len(waiting) >= rows_a_shard or time.monotonic() - written > _SECONDS_A_SHARD:
                    append()
        finally:
            append()
    return drawn


def show(table: VStarTable, tracker: Tracker) -> None:
    """Show what a table holds."""
    tracker.table(f"V* table {table.folder}", table.summary().rows())
