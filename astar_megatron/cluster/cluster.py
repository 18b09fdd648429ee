"""Ray: started on this machine when no address is given, joined when one is; actors are started here and nowhere else.

A session that is started here lives on the loopback address, so that no change of the machine's own (a VPN, another
network) reaches it and nobody else does; its token is in no file, its sockets and logs are in session.py's folder.

Leaves out what several nodes need to end an actor that hangs on another one.
"""

import contextlib
import logging
import os
import re
import secrets
import signal
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ray
from ray._private import ray_constants, services, state
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._private.worker import global_worker
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

from astar_megatron.cluster.address import knock, unanswered
from astar_megatron.cluster.cores import available_cores
from astar_megatron.cluster.endings import cause_in, core_end, is_secondary, memory_kills
from astar_megatron.cluster.errors import ActorLost, ClusterError
from astar_megatron.cluster.placement import Node, Placement, Seat
from astar_megatron.cluster.processes import Processes, kill, tree
from astar_megatron.cluster.reservation import Reservation
from astar_megatron.cluster.session import SessionFolder, write_stacks
from astar_megatron.cluster.signals import RESUME
from astar_megatron.cluster.stacks import where
from astar_megatron.config import ClusterConfig

OBJECT_STORE_BYTES = 256 << 20  # prompts and rollouts are small; weights do not pass through it
_LOOPBACK = "127.0.0.1"
# Ray puts the folder in which it is started or joined before everything else on its workers' Python path: a numbers.py
# of the user's would be imported there in place of Python's. No module lies here.
_NEUTRAL_FOLDER = "/"
_SAFE_PATH = {"PYTHONSAFEPATH": "1"}  # nor do processes that an actor starts look for modules where they run
_CLOSE_SECONDS = 20.0
_OTHERS_SECONDS = 1.0  # after a failure, for the processes whose ends caused it to be heard of
_ENDS = (RayActorError, OutOfMemoryError)  # of processes
_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}


class _OwnGroup(services.ConsolePopen):
    """How Ray starts its processes: in a process group each, so that signals to the driver's group are the driver's.

    `timeout`, shells and terminals send to groups; without its daemons a run could not end in order.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, process_group=0, **options)


class Cluster:
    """The Ray session of a run. A context manager: what it started ends with it."""

    def __init__(self, cfg: ClusterConfig) -> None:
        self._cfg = cfg
        self._actors: dict[str, tuple[str, int, Any]] = {}  # by Ray's id: the name in messages, the handle
        self._processes: dict[str, Processes] = {}  # of actors, by Ray's id
        self._memory_kills = 0
        self.nodes: dict[str, Node] = {}  # by Ray's id; the driver's own first
        self._reservation: Reservation | None = None

    def __enter__(self) -> Self:
        logging.getLogger("ray").setLevel(logging.ERROR)
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        self._memory_kills = memory_kills()
        with contextlib.ExitStack() as stack:
            self._folder = stack.enter_context(SessionFolder())
            stack.callback(ray.shutdown)
            handler = signal.getsignal(signal.SIGTERM)
            self._join(self._cfg.address) if self._cfg.address else self._begin()
            if threading.current_thread() is threading.main_thread() and handler is not None:
                signal.signal(signal.SIGTERM, handler)  # Ray has put its own there, which prints its stack first
            self.nodes = _nodes()
            if self.num_nodes > 1:
                raise ClusterError(
                    f"cluster.address: the Ray cluster has {self.num_nodes} nodes; the ways of weights between nodes "
                    "(gloo and NCCL) have run within one machine only so far: join a cluster of one node"
                )
            self._ends = stack.pop_all()
        return self

    def _begin(self) -> None:
        """Start a session of this machine on the loopback address, whatever its network is or becomes."""
        # Where Ray serves no clusters (macOS) it keeps to loopback; elsewhere it would turn 127.0.0.1 into the
        # machine's own address, and servers with that one listen on all interfaces.
        ray_constants.ENABLE_RAY_CLUSTER = False
        os.environ.pop("RAY_AUTH_MODE", None)  # of the user's other clusters; without it Ray asks for a token here
        services.ConsolePopen = _OwnGroup
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else Ray writes one into HOME
        try:
            with contextlib.chdir(_NEUTRAL_FOLDER):
                ray.init(
                    address="local",
                    include_dashboard=False,
                    object_store_memory=OBJECT_STORE_BYTES,
                    _node_ip_address=_LOOPBACK,
                    _temp_dir=str(self._folder.path),
                    **_QUIET,
                )
        except SystemExit:  # of the handler of SIGTERM that Ray puts there first of all
            raise SystemExit(RESUME) from None
        self._folder.path.chmod(0o700)  # Ray has opened it to everyone

    def _join(self, address: str) -> None:
        ray_constants.ENABLE_RAY_CLUSTER = True
        # `ray start` asks for the token of this user by itself, joining by an address does not offer it. To set
        # RAY_AUTH_MODE would not do: Ray has read it when it was imported.
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        knock(address)
        try:
            with contextlib.chdir(_NEUTRAL_FOLDER):
                ray.init(address=address, **_QUIET)
        except (OSError, RuntimeError, ValueError) as error:
            raise unanswered(address, error) from None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is not None and issubclass(kind, Exception):
            write_stacks(self._folder.path)
        for *_, actor in list(self._actors.values()):
            with contextlib.suppress(RayActorError):
                ray.kill(actor)
        self._actors.clear()
        self._ends.__exit__(kind, error, tb)
        for processes in self._processes.values():
            kill(processes)  # what hangs, and was started by an actor: Ray ends only what listens

    def remember_shared_files(self) -> None:
        """Note what the run's processes have in /dev/shm now: a killed one leaves it, and then it is removed for it."""
        self._folder.remember(os.getpid())

    def remember_processes(self, actor: Any) -> None:
        """Note which processes an actor has, to end them all when it is ended, or has been."""
        self._processes[actor._actor_id.hex()] = tree(self._pid(actor._actor_id.hex()))

    def end(self, actor: Any) -> None:
        """End an actor and all that it has started on this machine, although they hang or their parent is dead."""
        name = actor._actor_id.hex()
        processes = self._processes.pop(name, None) or tree(self._pid(name))
        with contextlib.suppress(RayActorError):
            ray.kill(actor)
        kill(processes)

    @staticmethod
    def _pid(actor: str) -> int | None:
        """The process of an actor, by Ray's id of it; None on another machine, or before there is one."""
        facts = state.actors(actor)
        is_here = facts.get("Address", {}).get("NodeID") == ray.get_runtime_context().get_node_id()
        return facts.get("Pid") or None if is_here and facts.get("State") != "DEAD" else None

    @property
    def num_nodes(self) -> int:
        return len(self.nodes)

    @property
    def num_gpus(self) -> int:
        return sum(node.num_gpus for node in self.nodes.values())

    def reserve(self, placement: Placement) -> None:
        """Hold the nodes and GPUs of a placement until the session is left; once. Raises ClusterError."""
        self._reservation = Reservation(placement, self.timeout_seconds)

    @property
    def reservation(self) -> Reservation:
        """What is held. Its placement has the seats of ranks and engines."""
        assert self._reservation is not None, "nothing is reserved yet"
        return self._reservation

    @property
    def socket_folder(self) -> str | None:
        """Where actors put their unix sockets; None where they may run on another machine."""
        return None if self._cfg.address else str(self._folder.path)

    @property
    def address(self) -> str:
        """Where actors of this run reach each other: loopback, unless there are several nodes."""
        return _LOOPBACK if self.num_nodes == 1 else ray.util.get_node_ip_address()

    @property
    def log_folder(self) -> Path:
        """Where the output of this session's processes lies, on this machine."""
        return Path(_log_folder())

    @property
    def timeout_seconds(self) -> float:
        return self._cfg.start_timeout_seconds

    def threads(self, seats: Sequence[Seat], workers: int = 1) -> int:
        """CPU threads of a process: `cluster.threads`, or the cores shared among those of a side that are on a node.

        Each seat has so many `workers`. Policy and engines take turns, so each side may use all cores; every node is
        taken to have as many as the driver's.
        """
        most = max(Counter(seat.node for seat in seats).values()) * workers
        return self._cfg.threads or max(1, int(available_cores()) // most)

    def close(self, action: str, references: Sequence[Any]) -> None:
        """Wait a little for actors to end in order; whatever stands in the way, leaving the session kills them."""
        with contextlib.suppress(ClusterError, ValueError):
            self.wait(action, references, _CLOSE_SECONDS)

    def actor(
        self,
        kind: str,
        index: int,
        cls: type,
        *,
        env: Mapping[str, str],
        seat: Seat | None = None,
        concurrency: int | None = None,
        **init: Any,
    ) -> Any:
        """Start an actor of `cls` and return its handle at once; `kind` and `index` name it in errors.

        It asks Ray for nothing: `seat` (None: anywhere) is reserved, and its `env` says which GPUs it sees. Ray could
        not give an engine halves of several, nor a laptop's two logical CPUs to more than two actors.
        """
        options: dict[str, Any] = {
            "num_cpus": 0,
            "num_gpus": 0,
            "runtime_env": {
                "env_vars": _SAFE_PATH | ({} if self._cfg.address else self._folder.environment) | dict(env)
            },
        }
        if seat is not None:
            options["scheduling_strategy"] = self.reservation.strategy(seat)
        if concurrency:
            options["max_concurrency"] = concurrency
        handle = ray.remote(cls).options(**options).remote(**init)
        self._actors[handle._actor_id.hex()] = (kind, index, handle)
        return handle

    def wait(self, action: str, references: Sequence[Any], timeout_seconds: float | None = None) -> list[Any]:
        """Return the results of actor calls; raises ClusterError that says which `action` failed, whose, and why.

        The first failure ends the wait: the other ranks may hang in a collective that can't complete any more. Without
        `timeout_seconds` an answer may take cluster.call_timeout_seconds.
        """
        key = "call_timeout_seconds" if timeout_seconds is None else "start_timeout_seconds"
        seconds = timeout_seconds or self._cfg.call_timeout_seconds
        deadline, pending = time.monotonic() + seconds, list(references)
        while pending:
            done, pending = ray.wait(pending, timeout=max(0.0, deadline - time.monotonic()))
            if not done:
                raise self._late(action, pending, seconds, f"cluster.{key}")
            try:
                ray.get(done)
            except (RayTaskError, *_ENDS) as error:
                raise self._failure(action, done[0], error, pending) from None
        return ray.get(list(references))

    def _failure(self, action: str, failed: Any, error: Exception, pending: Sequence[Any]) -> Exception:
        """What to raise for a call that failed; the end of a process goes before the errors that it gave others."""
        if isinstance(error, RayTaskError) and isinstance(error.cause, ValueError):
            return error.cause  # a wrong input that only the actor could see: its message says it all
        others, _ = ray.wait(list(pending), num_returns=len(pending), timeout=_OTHERS_SECONDS) if pending else ([], [])
        for reference, other in ((failed, error), *((reference, _error_of(reference)) for reference in others)):
            if other is not None and _is_end(other):
                failed, error = reference, other
                break
        (kind, index), outputs = self._outputs(failed)
        name, text = f"{kind} {index}", re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # without Ray's colours
        is_lost = _is_end(error)
        if is_lost:
            event = "the process ended"
            cause = _low_memory(text) or cause_in(outputs) or _end_of_process(text)
        else:
            event, cause = text, text.strip().splitlines()[-1]
            if is_secondary(cause):
                cause = _cause_in(outputs) or core_end(cause) or cause
        if memory_kills() > self._memory_kills:
            cause += " (the kernel killed a process for memory meanwhile)"
        message = f"{action}: {name}: {event}\nThe output of its processes lies in {_log_folder()}\n{name}: {cause}"
        return ActorLost(message, kind=kind, index=index) if is_lost else ClusterError(message)

    def _late(self, action: str, pending: Sequence[Any], seconds: float, key: str) -> ActorLost:
        """What to raise where there was no answer in time: by the last error of each that did not, and where it is."""
        lines = []
        for reference in pending:
            (kind, index), outputs = self._outputs(reference)
            place = where(tree(self._pid(reference.task_id().actor_id().hex())), outputs)
            words = [f"no answer in {seconds:.0f} s", *filter(None, [place, cause_in(outputs)])]
            lines.append(f"\n{kind} {index}: {'; '.join(words)}")
        (kind, index), _ = self._outputs(pending[0])
        message = (
            f"{action}: no answer in {seconds:.0f} s; raise {key} on a slow machine. The output of its processes, with "
            f"the stacks of all threads, lies in {_log_folder()}{''.join(lines)}"
        )
        return ActorLost(message, kind=kind, index=index)

    def _outputs(self, reference: Any) -> tuple[tuple[str, int], list[Path]]:
        """The actor that a call was made on, by kind and index, and the files of its output, what it logged first."""
        actor = reference.task_id().actor_id().hex()
        kind, index, _ = self._actors.get(actor, ("actor", 0, None))
        pid = state.actors(actor).get("Pid")
        return (kind, index), [
            path for end in ("out", "err") for path in Path(_log_folder()).glob(f"worker-*-{pid}.{end}")
        ]


def _is_end(error: Exception) -> bool:
    """Whether a process ended, which had begun: an error of its constructor ends it too, but says why."""
    return isinstance(error, _ENDS) and "creation task" not in str(error)


def _low_memory(text: str) -> str | None:
    """What to say where Ray ended a process to keep the machine's memory from filling up."""
    match = re.search(r"Memory on the node.*?was\s+(\S+)\s+used\s+/\s+(\S+)\s+limit", text, re.DOTALL)
    if match is None:
        return None
    return f"Ray ended it, as {match[1]} of the machine's {match[2]} of memory were used; close other programs"


def _error_of(reference: Any) -> Exception | None:
    try:
        ray.get(reference)
    except (RayTaskError, *_ENDS) as error:
        return error
    return None


def _cause_in(outputs: Sequence[Path]) -> str | None:
    """The last error in `outputs`; waits a little for what a child's end, told by its parent, still has to say."""
    until = time.monotonic() + _OTHERS_SECONDS
    while (cause := cause_in(outputs)) is None and time.monotonic() < until:
        time.sleep(0.1)
    return cause


def _end_of_process(text: str) -> str:
    """How Ray says that a process ended, without what it says of every end."""
    if match := re.search(r"exits with an exit code (\d+)\.( The process receives a SIGTERM)?", text):
        return "was killed by SIGTERM" if match[2] else f"ended with exit status {match[1]}"
    if "connection error code 2" in text:
        return "was killed (SIGKILL), or ended itself at once: it left no word"
    return text.strip().splitlines()[-1]


def _nodes() -> dict[str, Node]:
    own = ray.get_runtime_context().get_node_id()
    alive = [node for node in ray.nodes() if node["Alive"]]
    alive.sort(key=lambda node: (node["NodeID"] != own, node["NodeManagerAddress"], node["NodeID"]))
    nodes = [
        Node(address=node["NodeManagerAddress"], num_gpus=int(node["Resources"].get("GPU", 0)), id=node["NodeID"])
        for node in alive
    ]
    return {node.id: node for node in nodes}


def _log_folder() -> str:
    node = global_worker.node
    return node.get_logs_dir_path() if node else "the logs of Ray's session"
