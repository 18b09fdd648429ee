"""An engine as an actor: on its node, where its start log lies, and as the driver knows it."""

import os
from typing import Any

from astar_megatron.cluster import nodes, session
from astar_megatron.rollout.engine import Engine, EngineOptions
from astar_megatron.rollout.start_log import StartLog


class EngineActor(Engine):
    """An engine that writes its start log, by this name, among those of its node."""

    def __init__(self, *, log: str, options: EngineOptions) -> None:
        session.name_semaphores()
        os.environ.update(StartLog.make(nodes.log_folder(), log).environment())
        super().__init__(options)


def phase(log: str, has_graphs: bool) -> str:
    """Return what the engine of this node that writes `log` does."""
    return StartLog.of(nodes.log_folder(), log).phase(has_graphs=has_graphs)


class Member:
    """The engine of one index, for as long as its actor lives; `log` names its start log."""

    def __init__(self, index: int, actor: Any, log: str, num_ends: int) -> None:
        self.index, self.actor, self.log = index, actor, log
        self.starting = actor.start.remote()
        self.num_ends = num_ends  # of those before it, without an answer in between
        self.runs = self.serves = self.is_lost = False  # has started; has the weights to draw with; is being replaced
