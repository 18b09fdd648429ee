"""What a failed run says and how it ends, where Ray itself is played."""

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray import exceptions

from astar_megatron.cluster import cluster as module
from astar_megatron.cluster import failures, nodes
from astar_megatron.cluster.cluster import Cluster
from astar_megatron.cluster.errors import ActorLost, ClusterError
from astar_megatron.cluster.failures import Failures
from astar_megatron.cluster.placement import Node
from astar_megatron.config import ClusterConfig


def test_a_session_is_left_although_a_signal_comes_while_stacks_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def write_stacks(_folder: Path) -> None:
        raise SystemExit(75)

    monkeypatch.setattr(module, "write_stacks", write_stacks)
    cluster: Any = Cluster(ClusterConfig())
    left: list[str] = []
    cluster._folder, cluster._here, cluster._ends = SimpleNamespace(path=Path("/none")), "", contextlib.ExitStack()
    cluster._ends.callback(left.append, "session")
    cluster._processes = SimpleNamespace(end_here=lambda _: left.append("processes"))
    error = ActorLost("policy: step: policy rank 0: was killed", kind="policy rank", index=0)
    with pytest.raises(SystemExit, match="75"):
        cluster.__exit__(ActorLost, error, None)
    assert left == ["session", "processes"]


class Call:
    """A reference to a call on the actor `name`, which is its id too."""

    def __init__(self, name: str) -> None:
        self._name = name

    def task_id(self) -> "Call":
        return self

    def actor_id(self) -> "Call":
        return self

    def hex(self) -> str:
        return self._name


def on_node(node: str, function: Callable[..., Any], *arguments: Any) -> Any:
    return Path("/logs") if function is nodes.log_folder else None


def on_nodes(function: Callable[..., Any], arguments: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """Each node with its own arguments; the far one is silent."""
    return {node: "no answer in 60 s" if node == "far" else function(*own) for node, own in arguments.items()}


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Failures:
    """Ranks 0 and 1 are processes of a node, and 2 of one that is far; rank 3 has not begun."""
    at = {"a": "here", "b": "here", "c": "far", "d": ""}
    pids = {"a": 11, "b": 12, "c": 13, "d": None}
    monkeypatch.setattr(failures, "node_of", at.__getitem__)
    monkeypatch.setattr(failures, "alive_pid", pids.__getitem__)
    monkeypatch.setattr(failures.state, "actors", lambda actor: {"Pid": pids[actor]})
    monkeypatch.setattr(nodes, "log_folder", lambda: Path("/logs"))
    monkeypatch.setattr(Failures, "_is_up", lambda *_: True)
    actors = {name: ("policy rank", rank, None) for rank, name in enumerate(at)}
    places = {name: Node(address=f"10.0.0.{i}", num_gpus=0, id=name) for i, name in enumerate(("here", "far"))}
    return Failures(on_node, on_nodes, actors, places)


def test_all_that_do_not_answer_are_asked_at_once(heard: Failures, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one is that hangs takes seconds to find out, of each that it has started."""
    both = threading.Barrier(2)

    def where(pids: Mapping[int, str], _outputs: Sequence[Path]) -> str:
        both.wait(60)  # raises where the other comes only afterwards
        return f"process {min(pids)} is at step.py:7"

    monkeypatch.setattr(nodes, "where", where)
    monkeypatch.setattr(nodes, "tree", lambda pid: {pid: "1"})
    monkeypatch.setattr(nodes, "last_error", {11: None, 12: "ValueError: a"}.__getitem__)
    error = heard.late("policy: step", [Call(name) for name in ("b", "a", "a", "c", "d")], 9, "key")
    assert (error.kind, error.index) == ("policy rank", 1)
    first_line, *lines = str(error).splitlines()
    assert first_line.endswith(
        "lies in /logs on node 10.0.0.0 and the logs of Ray's session on node 10.0.0.1 and the logs of Ray's session"
    )
    assert lines == [
        "policy rank 1: no answer in 9 s; process 12 is at step.py:7; ValueError: a",
        "policy rank 0: no answer in 9 s; process 11 is at step.py:7",
        "policy rank 2: no answer in 9 s; its node: no answer in 60 s",
        "policy rank 3: no answer in 9 s",
    ]


def test_actors_of_two_kinds_and_one_index_are_both_told(heard: Failures, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(heard._actors, "b", ("engine", 0, None))  # type: ignore[index]
    monkeypatch.setattr(heard, "_last_words", lambda actors: {actor: ("/logs", [actor]) for actor in actors})
    error = heard.late("start", [Call("b"), Call("a")], 9, "key")
    causes = ["engine 0: no answer in 9 s; b", "policy rank 0: no answer in 9 s; a"]
    assert str(error).splitlines()[1:] == causes
    assert (error.kind, error.causes) == ("engine", {0: causes[0]})


def test_a_kill_for_memory_is_told_of_the_failures_that_follow_at_once(
    heard: Failures, monkeypatch: pytest.MonkeyPatch
) -> None:
    kills = failures.memory_kills()
    told = []
    for more, seconds_later in ((0, 0.0), (1, 0.0), (1, 0.0), (1, 61.0), (2, 0.0)):
        heard._noticed -= seconds_later
        monkeypatch.setattr(failures, "memory_kills", lambda more=more: kills + more)
        error = heard.failed("engines: generate", Call("a"), exceptions.RayError("prompt too long"), [])
        told.append("the kernel killed a process for memory" in str(error))
    assert told == [False, True, True, False, True]


LOST = ("00", b"", "")
ITS_NODE = "policy rank 0: its node has ended, or does not answer: "
ENDS = {
    "of its process": (exceptions.WorkerCrashedError(), "policy rank 0: The worker died unexpectedly"),
    "of its node": (exceptions.NodeDiedError("node 7 is dead"), f"{ITS_NODE}node 7 is dead$"),
    "of its raylet": (exceptions.LocalRayletDiedError(), ITS_NODE),
    "of where its answer lay": (exceptions.ObjectLostError(*LOST), ITS_NODE),
    "of its answer's owner": (exceptions.OwnerDiedError(*LOST), ITS_NODE),
    "of its answer's source": (exceptions.ObjectFetchTimedOutError(*LOST), ITS_NODE),
    "for good": (exceptions.ObjectReconstructionFailedError("00"), ITS_NODE),
}


@pytest.mark.parametrize("end", ENDS)
def test_who_has_ended_with_its_answer_is_lost(heard: Failures, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    error, words = ENDS[end]
    with pytest.raises(ActorLost, match=rf"(?s)policy: step: .*\n{words}") as caught:
        waited(heard, monkeypatch, error)
    assert (caught.value.kind, caught.value.index) == ("policy rank", 0)


DEFECTS = [
    exceptions.ObjectFreedError(*LOST),
    exceptions.ReferenceCountingAssertionError(*LOST),
    exceptions.RuntimeEnvSetupError("env_vars"),
    exceptions.AsyncioActorExit(),
]


@pytest.mark.parametrize("defect", DEFECTS, ids=repr)
def test_another_error_of_rays_is_no_lost_process_and_names_who_failed(
    heard: Failures, monkeypatch: pytest.MonkeyPatch, defect: Exception
) -> None:
    with pytest.raises(ClusterError, match=r"^policy: step: policy rank 0: ") as caught:
        waited(heard, monkeypatch, defect)
    assert not isinstance(caught.value, ActorLost)


def waited(heard: Failures, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Waits for a call that fails so."""

    def get(_: object) -> None:
        raise error

    monkeypatch.setattr(module.ray, "wait", lambda calls, **_: (calls, []))
    monkeypatch.setattr(module.ray, "get", get)
    cluster: Any = Cluster(ClusterConfig())
    cluster._failures = heard
    cluster.wait("policy: step", [Call("a")])


def test_each_node_is_asked_with_its_own_arguments_before_any_answer_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []

    def task_on(node: str, _: Callable[..., Any]) -> Any:
        return SimpleNamespace(remote=lambda own: asked.append(node) or f"{node} {own}")

    monkeypatch.setattr(module, "task_on", task_on)
    monkeypatch.setattr(module, "answers", lambda calls, _: calls if asked == ["far", "off"] else {})
    cluster: Any = Cluster(ClusterConfig())
    cluster._here = "here"
    given = {"far": (1,), "here": (2,), "off": (3,)}
    assert cluster.on_nodes(str, given) == {"here": "2", "far": "far 1", "off": "off 3"}
    asked.clear()
    monkeypatch.setattr(ray, "get", lambda call, timeout: call if asked == ["far", "off"] else "asked one by one")
    cluster.nodes = {node: Node(address=node, num_gpus=0, id=node) for node in given}
    assert cluster.on_each(str, 4) == {"here": "4", "far": "far 4", "off": "off 4"}
