"""Rollouts of a pool of engines, all at once."""

from collections.abc import Sequence

from astar_megatron.config import SamplingConfig
from astar_megatron.rollout.pool import EnginePool, Item
from astar_megatron.types import Rollout


def drawn(engines: EnginePool, work: Sequence[Item], sampling: SamplingConfig) -> list[Rollout]:
    """Return the rollouts of `work` in its order."""
    rollouts = dict(answer for finished in engines.generate(work, sampling) for answer in finished)
    return [rollouts[index] for index in range(len(work))]
