"""The end of many actors: each node is asked once, however many of them it has, and whether they have told or not."""

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from astar_megatron.cluster import actors
from astar_megatron.cluster.actors import ActorProcesses
from astar_megatron.cluster.processes import kill, tree

# By actor; `d` has not begun, `e` has ended before it told what it had started.
STATES = {
    "a": {"State": "ALIVE", "Pid": 11, "Address": {"NodeID": "near"}},
    "b": {"State": "DEAD", "Pid": 12, "Address": {"NodeID": "far"}},
    "c": {"State": "ALIVE", "Pid": 13, "Address": {"NodeID": "far"}},
    "d": {"State": "PENDING_CREATION"},
    "e": {"State": "DEAD", "Pid": 15, "Address": {"NodeID": "far"}},
    "f": {"State": "ALIVE", "Pid": 16, "Address": {"NodeID": "lost"}},
}


class Handle:
    def __init__(self, name: str) -> None:
        self._actor_id = SimpleNamespace(hex=lambda: name)
        self.__ray_call__ = SimpleNamespace(remote=lambda _: name)


def test_the_processes_of_many_actors_end_with_two_questions_to_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Any]] = []

    def on_nodes(function: Callable[..., Any], arguments: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
        asked.append((function.__name__, {node: tuple(own) for node, own in arguments.items()}))
        # `lost` has just ended: a word in place of an answer
        answers = {"far": {13: "c", 14: "of c"}, "near": {}, "lost": "no answer in 60 s"}
        return {node: answers[node] if function is tree else None for node in arguments}

    def wait(_action: str, calls: Sequence[str], _seconds: float) -> list[Any]:
        return [{ord(name): name} for name in calls]

    monkeypatch.setattr(actors.state, "actors", STATES.__getitem__)
    monkeypatch.setattr(ray, "kill", lambda handle: asked.append(("ray.kill", handle._actor_id.hex())))
    processes = ActorProcesses(on_nodes, wait)
    handles = {name: Handle(name) for name in STATES}
    processes.remember([handles["a"], handles["b"]])
    processes.end(list(handles.values()))
    assert asked == [
        (tree.__name__, {"far": (13,), "lost": (16,)}),
        *(("ray.kill", name) for name in STATES),
        (kill.__name__, {"near": ({97: "a"},), "far": ({98: "b", 13: "c", 14: "of c"},)}),
    ]
    asked.clear()
    processes.end([handles["b"]])  # what it had started is forgotten: numbers of processes are given again
    assert asked == [("tree", {}), ("ray.kill", "b"), ("kill", {})]
