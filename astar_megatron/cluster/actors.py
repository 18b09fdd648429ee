"""Ray's actors: where they run, which processes they have, and the end of these although they hang."""

import contextlib
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray._private import state
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from astar_megatron.cluster.calls import answers_of
from astar_megatron.cluster.errors import ClusterError
from astar_megatron.cluster.processes import Processes, kill, tree

_END_SECONDS = 20.0  # for other nodes to end what runs there
_ANSWER_SECONDS = 60.0  # for an actor that has just begun


def node_of(actor: str) -> str:
    """Return Ray's id of the node on which an actor, by its own id, runs or ran; empty before there is one."""
    return state.actors(actor).get("Address", {}).get("NodeID", "")


def alive_pid(actor: str) -> int | None:
    """Return the process of an actor on its node; None before there is one, or after."""
    facts = state.actors(actor)
    return facts.get("Pid") or None if facts.get("State") != "DEAD" else None


def task_on(node: str, function: Callable[..., Any]) -> Any:
    """Return a function that is called in a process which Ray starts on a node, with `.remote()`."""
    options: dict[str, Any] = {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}
    return ray.remote(function).options(num_cpus=0, max_retries=0, **options)


class ActorProcesses:
    """What actors have started. It ends with them, although they hang or are dead already.

    `on_nodes` calls a function on several nodes at once, `wait` waits for calls; both are Cluster's.
    """

    def __init__(self, on_nodes: Callable[..., Any], wait: Callable[[str, Sequence[Any], float], list[Any]]) -> None:
        self._on_nodes, self._wait = on_nodes, wait
        self._started: dict[str, tuple[str, Processes]] = {}  # by actor: its node, and what runs there

    def remember(self, actors: Sequence[Any]) -> None:
        """Ask actors which processes they have now. One that has ended is left out."""
        calls = {actor._actor_id.hex(): actor.__ray_call__.remote(_own_processes) for actor in actors}
        answers = answers_of(lambda action, some: self._wait(action, some, _ANSWER_SECONDS), "processes", calls)
        for actor, processes in answers.items():
            if not isinstance(processes, ClusterError):
                self._started[actor] = node_of(actor), processes

    def end(self, handles: Sequence[Any]) -> None:
        """End actors and all that they have started. A node that has ended took with it what ran there."""
        processes: defaultdict[str, Processes] = defaultdict(dict)  # by node
        unknown: defaultdict[str, list[int]] = defaultdict(list)  # actors that have not said what they started
        for actor in (handle._actor_id.hex() for handle in handles):
            if actor in self._started:
                node, own = self._started.pop(actor)
                processes[node] |= own
            elif pid := alive_pid(actor):
                unknown[node_of(actor)].append(pid)
        trees = self._on_nodes(tree, unknown)
        for node, answer in trees.items():
            processes[node] |= {} if isinstance(answer, str) else answer
        for handle in handles:
            with contextlib.suppress(RayActorError):
                ray.kill(handle)
        self._on_nodes(kill, {node: (own,) for node, own in processes.items() if own})

    def end_elsewhere(self, here: str) -> None:
        """End what hangs on other nodes than this, while Ray is there to do it."""
        by_node: defaultdict[str, Processes] = defaultdict(dict)
        for node, processes in self._started.values():
            by_node[node] |= processes
        ends = [task_on(node, kill).remote(processes) for node, processes in by_node.items() if node != here]
        if ends:
            ray.wait(ends, num_returns=len(ends), timeout=_END_SECONDS)

    def end_here(self, here: str) -> None:
        """End what hangs on this node; Ray ends only what listens."""
        for node, processes in self._started.values():
            if node == here:
                kill(processes)


def _own_processes(actor: object) -> Processes:
    """In an actor: its process and all that it has started."""
    return tree(os.getpid())
