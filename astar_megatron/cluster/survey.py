"""Asking all nodes of a Ray cluster at once: who has joined, what a function answers there, what their clocks say.

A node that fails to answer is an answer here, by its name. Names are those of `ray start --node-name`, which without
one are the nodes' addresses.
"""

import statistics
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from astar_megatron.cluster.actors import task_on
from astar_megatron.cluster.address import knock
from astar_megatron.cluster.errors import ClusterError
from astar_megatron.cluster.placement import Node

type Answers[T] = dict[str, T | str]

_POLL_SECONDS = 0.5
_CLOCK_TRIES = 3
_CLOCK_SECONDS = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """How far a node's clock is ahead of the driver's, and how far that may be off."""

    seconds: float
    error_seconds: float


def wait_for_head(address: str, until: float) -> None:
    """Return when something listens at host:port. Raises ClusterError after the moment `until` (time.monotonic)."""
    while True:
        try:
            return knock(address)
        except ClusterError:
            if time.monotonic() > until:
                raise
        time.sleep(_POLL_SECONDS)


def joined_nodes() -> list[Node]:
    """Return the nodes that have joined and are alive, with the GPUs that Ray has there."""
    return [
        Node(
            address=node["NodeManagerAddress"],
            num_gpus=int(node["Resources"].get("GPU", 0)),
            id=node["NodeID"],
            name=node["NodeName"],
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def wait_for_nodes(wanted: Collection[str] | int, until: float) -> dict[str, Node]:
    """Return the nodes by name when all `wanted`, or so many, have joined; after `until` those that have."""
    while True:
        joined = {node.name: node for node in joined_nodes()}
        complete = len(joined) >= wanted if isinstance(wanted, int) else set(wanted) <= joined.keys()
        if complete or time.monotonic() > until:
            return joined
        time.sleep(_POLL_SECONDS)


def own_node() -> str:
    """Return Ray's id of the driver's node."""
    return ray.get_runtime_context().get_node_id()


def ask_all[T](nodes: Mapping[str, Node], seconds: float, function: Callable[..., T], *arguments: Any) -> Answers[T]:
    """Return by name what a function answers in a process on each node, all at once; a string: why it did not."""
    references = {}
    for name, node in nodes.items():
        references[name] = task_on(node.id, function).remote(*arguments)
    return answers(references, seconds)


def answers(references: Mapping[str, Any], seconds: float) -> Answers[Any]:
    """Return the results of calls by name; where there is none in time, or an error, a string that says so."""
    results: Answers[Any] = {}
    if not references:
        return results
    done, _ = ray.wait(list(references.values()), num_returns=len(references), timeout=seconds)
    for name, reference in references.items():
        if reference not in done:
            results[name] = f"no answer in {seconds:.0f} s"
            continue
        try:
            results[name] = ray.get(reference)
        except RayError as error:
            results[name] = f"{str(error).strip().splitlines()[-1]:.300}"
    return results


def clocks(nodes: Mapping[str, Node]) -> Answers[Clock]:
    """Return by name what the nodes' clocks say, one node after the other; the quickest of a few answers counts."""
    return {name: _clock(name, node) for name, node in nodes.items()}


def _clock(name: str, node: Node) -> Clock | str:
    best: Clock | None = None
    for _ in range(_CLOCK_TRIES):
        before = time.time()
        there = answers({name: task_on(node.id, _now).remote()}, _CLOCK_SECONDS)[name]
        after = time.time()
        if isinstance(there, str):
            return there
        clock = Clock(seconds=there - statistics.mean((before, after)), error_seconds=(after - before) / 2)
        best = clock if best is None or clock.error_seconds < best.error_seconds else best
    assert best is not None
    return best


def _now() -> float:
    return time.time()  # Ray takes no function that is not Python's
