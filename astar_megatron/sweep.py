"""Stage 1 of A*PO: N responses of the reference to every prompt, rewarded, into the V* table.

Append-only and resumable: what the table holds is not drawn again, more samples buy only the difference, and a
killed sweep loses at most the rows not yet appended.
"""

from astar_megatron.config import RunConfig
from astar_megatron.data.v_star import VStarTable
from astar_megatron.rollout.pool import EnginePool, seed_of
from astar_megatron.rollout.scoring import Scorer
from astar_megatron.run import Inputs, engines_of, prepare
from astar_megatron.tracking import Tracker
from astar_megatron.types import Rollout

_ROWS_A_SHARD = 512


def main(cfg: RunConfig) -> None:
    """Draw what the table lacks; starts nothing if it lacks nothing."""
    inputs = prepare(cfg)
    tracker = Tracker(cfg.run_dir)
    table = VStarTable.create_or_open(cfg.table_dir, inputs.contract)
    if table.missing(inputs.prompts, cfg.sweep.num_samples):
        with engines_of(cfg) as engines:
            table = sweep(cfg, inputs, engines, tracker)
    show(table, tracker)


def sweep(cfg: RunConfig, inputs: Inputs, engines: EnginePool, tracker: Tracker) -> VStarTable:
    """Fill the run's V* table with engines that hold the reference, and return it."""
    table = VStarTable.create_or_open(cfg.table_dir, inputs.contract)
    missing = table.missing(inputs.prompts, cfg.sweep.num_samples)
    work = [(prompt, sample, seed_of(cfg.seed, "sweep", prompt.uid, sample)) for prompt, sample in missing]
    waiting: list[Rollout] = []
    progress = tracker.progress("stage 1, V* sweep", len(work))
    with progress as advance, Scorer(cfg.reward, tracker.run_dir) as scorer:
        try:
            for finished in scorer.scored(engines.generate(work, cfg.sampling)):
                waiting += [rollout for _, rollout in finished]
                advance(len(finished))
                if len(waiting) >= _ROWS_A_SHARD:
                    _append(table, waiting)
        finally:
            _append(table, waiting)
    return table


def _append(table: VStarTable, waiting: list[Rollout]) -> None:
    table.append(waiting)
    waiting.clear()


def show(table: VStarTable, tracker: Tracker) -> None:
    """Show what a table holds."""
    held = table.summary()
    tracker.table(
        f"V* table {table.folder}",
        [
            ("prompts", str(held.prompts)),
            ("samples", str(held.samples)),
            ("mean reward", f"{held.mean_reward:.3f}"),
            ("all wrong / all right", f"{held.all_wrong:.1%} / {held.all_right:.1%} of the prompts"),
            ("response tokens", str(held.response_tokens)),
        ],
    )
