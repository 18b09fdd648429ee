"""What failed and why, where a call on an actor fails or does not answer: the error to raise.

Its last line is the cause, found in the output of the actor's processes on its node, before what follows from it.
"""

import contextlib
import math
import re
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray._private import state
from ray.exceptions import (
    LocalRayletDiedError,
    NodeDiedError,
    ObjectFreedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    ReferenceCountingAssertionError,
    WorkerCrashedError,
)

from astar_megatron.cluster import nodes
from astar_megatron.cluster.actors import alive_pid, node_of
from astar_megatron.cluster.endings import core_end, end_of_process, is_secondary, low_memory, memory_kills, was_killed
from astar_megatron.cluster.errors import ActorLost, ClusterError, NoAnswer
from astar_megatron.cluster.placement import Node
from astar_megatron.cluster.survey import Answers

ERRORS = RayError  # that a call on an actor fails of
_ENDS = (RayActorError, OutOfMemoryError, WorkerCrashedError)  # of processes
_NODES_ENDS = (NodeDiedError, LocalRayletDiedError, ObjectLostError)  # with the answers that lay there
_DEFECTS = (ObjectFreedError, ReferenceCountingAssertionError)  # of these: somebody has thrown an answer away
_LOGS = "the logs of Ray's session"
_FOLLOWS_SECONDS = 60.0  # in which failures may follow from a kill that the first of them showed
_OTHERS_SECONDS = 1.0  # after a failure, for the processes whose ends caused it to be heard of


class Failures:
    """Finds out what failed and why. `actors` and `nodes` are those of a Cluster, by Ray's ids, as they are then.

    `on_node` calls a function on a node, `on_nodes` on several at once, as Cluster's.
    """

    def __init__(
        self,
        on_node: Callable[..., Any],
        on_nodes: Callable[..., Answers[Any]],
        actors: Mapping[str, tuple[str, int, Any]],
        nodes: Mapping[str, Node],
    ) -> None:
        self._on_node, self._on_nodes, self._actors, self._nodes = on_node, on_nodes, actors, nodes
        self._memory_kills, self._noticed = memory_kills(), -math.inf  # those that are known, and since when

    def failed(self, action: str, failed: Any, error: Exception, pending: Sequence[Any]) -> Exception:
        """Return what to raise for a failed call; the end of a process goes before the errors that it gave others."""
        if isinstance(error, RayTaskError) and isinstance(error.cause, ValueError):
            return error.cause  # a wrong input that only the actor could see: its message says it all
        failed, error = _first_end(failed, error, pending)
        kind, index, actor = self._caller(failed)
        event, cause, is_lost = self._cause(error, actor)
        if (kills := memory_kills()) > self._memory_kills:
            self._memory_kills, self._noticed = kills, time.monotonic()
        if time.monotonic() - self._noticed < _FOLLOWS_SECONDS:
            cause += " (the kernel killed a process for memory meanwhile)"
        name = f"{kind} {index}"
        logs = self.logs_of(actor)
        message = f"{action}: {name}: {event}\nThe output of its processes lies in {logs}\n{name}: {cause}"
        return ActorLost(message, kind=kind, index=index) if is_lost else ClusterError(message)

    def _cause(self, error: Exception, actor: str) -> tuple[str, str, bool]:
        """What happened to an actor, why, and whether the actor is lost."""
        text = re.sub(r"\x1b\[[0-9;]*m", "", str(error) or repr(error))  # without Ray's colours
        if _is_end(error) and isinstance(error, _ENDS):
            return "the process ended", low_memory(text) or end_of_process(text, self._last_error(actor)), True
        cause = text.strip().splitlines()[-1]
        if not self._is_up(node_of(actor)):
            return text, "Ray's own process of its node, the raylet, has ended", True
        if _is_end(error):
            return text, f"its node has ended, or does not answer: {cause}", True
        if is_secondary(cause):
            cause = self._last_error(actor, _OTHERS_SECONDS) or core_end(cause) or cause
            return text, cause, was_killed(cause)  # what the actor had started
        return text, cause, False

    def late(self, action: str, pending: Sequence[Any], seconds: float, key: str) -> NoAnswer:
        """Return what to raise for no answer in time: by the last error of each that did not, and where it is."""
        actors = list(dict.fromkeys(self._caller(reference) for reference in pending))
        words_of = self._last_words([actor for *_, actor in actors])
        folders = dict.fromkeys(words_of[actor][0] for *_, actor in actors)
        silent = f"no answer in {seconds:.0f} s"
        causes = {
            (kind, index): f"{kind} {index}: {'; '.join([silent, *words_of[actor][1]])}"
            for kind, index, actor in actors
        }
        message = (
            f"{action}: {silent}; raise {key} on a slow machine. The output of its processes, with the stacks of all "
            f"threads, lies in {'\n'.join([' and '.join(folders), *causes.values()])}"
        )
        first = actors[0][0]
        return NoAnswer(message, kind=first, causes={i: cause for (kind, i), cause in causes.items() if kind == first})

    def logs_of(self, actor: str) -> str:
        """Return the folder of an actor's output, with its node where there are several."""
        node, folder = node_of(actor), _LOGS
        with contextlib.suppress(ClusterError):
            folder = str(self._on_node(node, nodes.log_folder))
        return self._at(node, folder)

    def _at(self, node: str, folder: str) -> str:
        has_others = len(self._nodes) > 1 and node in self._nodes
        return f"{folder} on node {self._nodes[node].address}" if has_others else folder

    def _is_up(self, node: str) -> bool:
        """Whether the raylet of a node, by Ray's id, still listens: Ray itself may notice its end much later."""
        for facts in ray.nodes():
            if facts["NodeID"] == node:
                with contextlib.suppress(OSError):
                    socket.create_connection((facts["NodeManagerAddress"], facts["NodeManagerPort"]), timeout=5).close()
                    return True
                return False
        return True  # nobody knows it: an actor that has not begun

    def _caller(self, reference: Any) -> tuple[str, int, str]:
        """The actor that a call was made on: its kind, its index, Ray's id of it."""
        actor = reference.task_id().actor_id().hex()
        kind, index, _ = self._actors.get(actor, ("actor", 0, None))
        return kind, index, actor

    def _last_error(self, actor: str, seconds: float = 0.0) -> str | None:
        """The last error in an actor's output; waits a little for what a child's end still has to say, if asked to."""
        until = time.monotonic() + seconds
        with contextlib.suppress(ClusterError):  # its node may have gone with it
            while True:
                cause = self._on_node(node_of(actor), nodes.last_error, state.actors(actor).get("Pid"))
                if cause is not None or time.monotonic() > until:
                    return cause
                time.sleep(0.1)
        return None

    def _last_words(self, actors: Sequence[str]) -> dict[str, tuple[str, list[str]]]:
        """Where the output of each actor lies, and what can be said of it; all nodes are asked at once."""
        pids: defaultdict[str, dict[str, int | None]] = defaultdict(dict)
        for actor in actors:
            pids[node_of(actor)][actor] = alive_pid(actor)
        told = self._on_nodes(nodes.last_words, {node: (pids[node],) for node in pids.keys() & self._nodes.keys()})
        words_of = {}
        for node, of_node in pids.items():
            answer = told.get(node, (_LOGS, {}))  # an actor that has not begun is on no node yet
            if isinstance(answer, str):
                answer = _LOGS, {actor: [f"its node: {answer}"] for actor in of_node}
            folder, words = answer
            words_of |= {actor: (self._at(node, str(folder)), words.get(actor, [])) for actor in of_node}
        return words_of


def error_of(reference: Any) -> Exception | None:
    """Return what a call failed of; None where it has an answer."""
    try:
        ray.get(reference)
    except ERRORS as error:
        return error
    return None


def _first_end(failed: Any, error: Exception, pending: Sequence[Any]) -> tuple[Any, Exception]:
    """The first call that a process's end failed, with its error, of a failed one and of those that fail beside it.

    The failed one itself where no process has ended.
    """
    others, _ = ray.wait(list(pending), num_returns=len(pending), timeout=_OTHERS_SECONDS) if pending else ([], [])
    for reference, other in ((failed, error), *((reference, error_of(reference)) for reference in others)):
        if other is not None and _is_end(other):
            return reference, other
    return failed, error


def _is_end(error: Exception) -> bool:
    """Whether a process or its node ended, which had begun: an error of a constructor ends it too, but says why."""
    is_end = isinstance(error, (*_ENDS, *_NODES_ENDS)) and not isinstance(error, _DEFECTS)
    return is_end and "creation task" not in str(error)
