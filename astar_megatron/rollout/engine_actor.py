"""An engine as an actor: on its node, where its start log lies."""

import os

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
