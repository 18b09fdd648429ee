"""What a run leaves of its steps, and when it ends: metrics, rollouts, bad batches, and what all that has cost."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from astar_megatron import config
from astar_megatron.config import RunConfig
from astar_megatron.data import bad_batches
from astar_megatron.data.estimates import Estimates
from astar_megatron.data.rollout_files import RolloutFiles
from astar_megatron.run import scores
from astar_megatron.run.board import Board, board_on
from astar_megatron.run.dashboards import Dashboards, dashboards_of
from astar_megatron.run.spending import Spending, generation_flops
from astar_megatron.run.steps import check_skipped, keep_bad_batch, line_of, metrics_of, skipped_of
from astar_megatron.run.tracking import Tracker
from astar_megatron.types import Rollout, RolloutBatch, StepStats
from conversion.families import Model


@contextmanager
def record_of(
    cfg: RunConfig,
    model: Model,
    tracker: Tracker,
    first: int,
    stage_1: Estimates | None,
    detokenize: Callable[[Sequence[int]], str],
) -> Iterator["Record"]:
    """The record of a run that goes on from step `first`; what was left of later steps is set aside.

    `stage_1` is what V* was made from, whose response tokens the run pays for.
    """
    bad_batches.set_aside(tracker.run_dir, first)
    scores.forget(tracker.run_dir, first)
    rollouts = RolloutFiles(tracker.run_dir, cfg.rollout.keep, detokenize)
    rollouts.begin(first)
    earlier = tracker.begin(first)
    stage_1_tokens = int(stage_1.tokens.sum()) if stage_1 else 0
    beginning = stage_1.distributions() if stage_1 else {}
    with (
        board_on(tracker.console, cfg.train.num_steps) as board,
        dashboards_of(cfg, first, earlier, beginning, tracker.say) as dashboards,
    ):
        for line in earlier:
            board.add(line)
        record = Record(
            model=model,
            tracker=tracker,
            board=board,
            dashboards=dashboards,
            rollouts=rollouts,
            spending=Spending(cfg.budget, cfg.train.num_steps, first, earlier),
            settings=config.flat(cfg),
            spent_tokens=stage_1_tokens + sum(line.get("response_tokens", 0) for line in earlier),
            skipped=sum(map(skipped_of, earlier)),
        )
        del earlier  # a long run's are much to keep while this goes on
        yield record


@dataclass(kw_only=True)
class Record:
    """What is written of the steps, and what they have cost. `settings` are the run's, one value a key path."""

    model: Model
    tracker: Tracker
    board: Board
    dashboards: Dashboards
    rollouts: RolloutFiles
    spending: Spending
    settings: Mapping[str, Any]
    spent_tokens: int  # of responses, stage 1's too
    skipped: int  # optimiser steps that were left out
    _writes: list[tuple[float, float]] = field(default_factory=list)

    def take_writes(self) -> list[tuple[float, float]]:
        """Return from when to when steps were written since the last call, by time.perf_counter()."""
        writes, self._writes = self._writes, []
        return writes

    def add(
        self,
        rollouts: Sequence[Rollout],
        batch: RolloutBatch,
        stats: StepStats,
        health: Mapping[str, float],
        seconds: dict[str, float],
        also: Mapping[str, object],
    ) -> None:
        """Write and say what a step did; first what is large, so that a line of metrics says that it is there.

        `also` are metrics of others: evaluations, the timeline, the fleet's.

        Raises StorageError, and NotFiniteError where too many optimiser steps were left out.
        """
        began, step, tracker = time.perf_counter(), batch.version, self.tracker
        self.spent_tokens += stats.response_tokens
        drawn = ((rollout.prompt, [len(rollout.token_ids)]) for rollout in rollouts)
        metrics = metrics_of(step, rollouts, health, stats, self.spent_tokens, seconds)
        metrics |= {"generation_flops": generation_flops(self.model, drawn), **also}
        self.spending.add(metrics)
        if stats.skipped:
            tracker.say(keep_bad_batch(tracker.run_dir, rollouts, batch, stats, self.settings))
        self.rollouts.write(step, rollouts, stats)
        tracker.log(metrics)
        self.dashboards.log(metrics, rollouts, batch, stats)
        self.board.add(metrics)
        tracker.say(line_of(metrics, self.settings["train.num_steps"]))
        self._writes.append((began, time.perf_counter()))
        self.skipped += skipped_of(metrics)
        check_skipped(self.skipped, self.settings["train.max_skipped_steps"], tracker.run_dir)
