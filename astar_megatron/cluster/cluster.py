"""Ray: started on this machine when no address is given, joined when one is; actors are started here and nowhere else.

A session that is started here lives on the loopback address, so that no change of the machine's own (a VPN, another
network) reaches it and nobody else does; its token is in no file, its sockets and logs are in session.py's folder.

A cluster of several nodes is only joined where they ask for a token. What a node alone can say of itself (nodes.py) is
asked there.
"""

import contextlib
import logging
import os
import secrets
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import ray
from ray._private import ray_constants, services
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray.exceptions import RayActorError, RayError, RayTaskError

from astar_megatron.cluster import nodes, signals
from astar_megatron.cluster.actors import ActorProcesses, node_of, task_on
from astar_megatron.cluster.address import knock, unanswered
from astar_megatron.cluster.cores import available_cores
from astar_megatron.cluster.errors import ClusterError
from astar_megatron.cluster.failures import ERRORS, Failures, error_of
from astar_megatron.cluster.placement import Node, Placement, Seat
from astar_megatron.cluster.reservation import Reservation
from astar_megatron.cluster.session import OBJECT_STORE_BYTES, SessionFolder, write_stacks
from astar_megatron.cluster.starting import check_loopback, unstarted
from astar_megatron.cluster.survey import Answers, answers, joined_nodes, own_node
from astar_megatron.config import ClusterConfig

LOOPBACK = "127.0.0.1"
# Ray puts the folder in which it is started or joined before everything else on its workers' Python path: a numbers.py
# of the user's would be imported there in place of Python's. No module lies here.
_NEUTRAL_FOLDER = "/"
_SAFE_PATH = {"PYTHONSAFEPATH": "1"}  # nor do processes that an actor starts look for modules where they run
_CLOSE_SECONDS = 20.0
_NODE_SECONDS = 60.0  # for a node to answer: it may have to start a process for it
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
        self._processes = ActorProcesses(self.on_nodes, self.wait)
        self.nodes: dict[str, Node] = {}  # by Ray's id; the driver's own first
        self._failures = Failures(self.on_node, self.on_nodes, self._actors, self.nodes)
        self._reservation: Reservation | None = None

    def __enter__(self) -> Self:
        logging.getLogger("ray").setLevel(logging.ERROR)
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        with contextlib.ExitStack() as stack:
            self._folder = stack.enter_context(SessionFolder())
            stack.callback(ray.shutdown)
            handler = signal.getsignal(signal.SIGTERM)
            self._join(self._cfg.address) if self._cfg.address else self._begin()
            if threading.current_thread() is threading.main_thread() and handler is not None:
                signal.signal(signal.SIGTERM, handler)  # Ray has put its own there, which prints its stack first
            self.nodes.update(_nodes())
            self._here = next(iter(self.nodes))
            if self.num_nodes > 1:
                self._check_tokens()
            self._ends = stack.pop_all()
        return self

    def _begin(self) -> None:
        """Start a session of this machine on the loopback address, whatever its network is or becomes."""
        # Where Ray serves no clusters (macOS) it keeps to loopback; elsewhere it would turn 127.0.0.1 into the
        # machine's own address, and servers with that one listen on all interfaces.
        ray_constants.ENABLE_RAY_CLUSTER = False
        services.ConsolePopen = _OwnGroup
        check_loopback(LOOPBACK)
        os.environ.pop("RAY_AUTH_MODE", None)  # of the user's other clusters; without it Ray asks for a token here
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else Ray writes one into HOME
        try:
            with contextlib.chdir(_NEUTRAL_FOLDER):
                ray.init(
                    address="local",
                    include_dashboard=False,
                    object_store_memory=OBJECT_STORE_BYTES,
                    _node_ip_address=LOOPBACK,
                    _temp_dir=str(self._folder.ray),
                    **_QUIET,
                )
        except SystemExit:  # of the handler of SIGTERM that Ray puts there first of all
            raise SystemExit(signals.RESUME) from None
        except Exception as error:  # Ray raises Exception itself
            raise unstarted(self._folder.ray, error) from None

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
        try:
            if kind is not None and issubclass(kind, Exception):
                write_stacks(self._folder.path)
            for *_, actor in list(self._actors.values()):
                with contextlib.suppress(RayActorError):
                    ray.kill(actor)
            self._actors.clear()
            if kind is not None:
                self._processes.end_elsewhere(self._here)
        finally:  # although a signal has come meanwhile
            try:
                self._ends.__exit__(kind, error, tb)
            finally:
                self._processes.end_here(self._here)

    def remember_shared_files(self) -> None:
        """Note what the run's processes have in /dev/shm now: a killed one leaves it, and then it is removed for it."""
        self._folder.remember(os.getpid())

    def remember_processes(self, actors: Sequence[Any]) -> None:
        """Note which processes actors have, to end them all when one is ended, or has been."""
        self._processes.remember(actors)

    def end(self, actors: Sequence[Any]) -> None:
        """End actors and all that they have started, at once, although they hang or their parent is dead."""
        self._processes.end(actors)

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
    def num_nodes(self) -> int:
        return len(self.nodes)

    def on_node[T](self, node: str, function: Callable[..., T], *arguments: Any) -> T:
        """Return what a function answers on a node, by Ray's id of it. Raises ClusterError where it does not.

        It is called in this process where that is its node, else in one that Ray starts there.
        """
        if node == self._here:
            return function(*arguments)
        if node not in self.nodes:
            raise ClusterError("an actor that has not begun is on no node yet")
        return self._answer(node, task_on(node, function).remote(*arguments))

    def on_each[T](self, function: Callable[..., T], *arguments: Any) -> dict[str, T]:
        """Return by node, by Ray's id, what a function answers on every node, asked at once; else as `on_node`."""
        calls = {node: task_on(node, function).remote(*arguments) for node in self.nodes if node != self._here}
        here = {node: function(*arguments) for node in self.nodes if node == self._here}
        return here | {node: self._answer(node, call) for node, call in calls.items()}

    def on_nodes(self, function: Callable[..., Any], arguments: Mapping[str, tuple[Any, ...]]) -> Answers[Any]:
        """Return by node, by Ray's id, what a function answers there, all at once; a string: why it did not.

        Each node has its `arguments`; where it is called is as for `on_node`.
        """
        calls = {node: task_on(node, function).remote(*own) for node, own in arguments.items() if node != self._here}
        here = {node: function(*own) for node, own in arguments.items() if node == self._here}
        return here | answers(calls, _NODE_SECONDS)

    def beside[T](self, actor: Any, function: Callable[..., T], *arguments: Any) -> T:
        """Return what a function answers on the node of an actor that has begun; as `on_node`."""
        return self.on_node(node_of(actor._actor_id.hex()), function, *arguments)

    def _answer(self, node: str, call: Any) -> Any:
        try:
            return ray.get(call, timeout=_NODE_SECONDS)
        except RayError as error:
            if isinstance(error, RayTaskError) and isinstance(error.cause, ClusterError | ValueError):
                raise error.cause from None
            raise ClusterError(
                f"node {self.nodes[node].address} does not answer ({str(error).strip().splitlines()[-1]:.300}); see "
                "that it is up, and that astar-megatron is installed there as it is here"
            ) from None

    def _check_tokens(self) -> None:
        for node, asks in self.on_each(nodes.asks_token).items():
            if not asks:
                raise ClusterError(
                    f"cluster.address: Ray on node {self.nodes[node].address} asks no token of those who reach it; "
                    f"start Ray on each of the {self.num_nodes} nodes with RAY_AUTH_MODE=token and one RAY_AUTH_TOKEN "
                    "(or one file, RAY_AUTH_TOKEN_PATH), and `astar` with the same"
                )

    @property
    def timeout_seconds(self) -> float:
        return self._cfg.start_timeout_seconds

    @property
    def call_timeout_seconds(self) -> float:
        return self._cfg.call_timeout_seconds

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

    @signals.kept()
    def wait(self, action: str, references: Sequence[Any], timeout_seconds: float | None = None) -> list[Any]:
        """Return the results of actor calls; raises ClusterError that says which `action` failed, whose, and why.

        The first failure ends the wait: the other ranks may hang in a collective that can't complete any more. Without
        `timeout_seconds` an answer may take cluster.call_timeout_seconds.
        """
        key = "call_timeout_seconds" if timeout_seconds is None else "start_timeout_seconds"
        seconds = timeout_seconds or self._cfg.call_timeout_seconds
        deadline, pending, answers = time.monotonic() + seconds, list(references), {}
        while pending:
            if not ray.wait(pending, timeout=max(0.0, deadline - time.monotonic()))[0]:
                raise self._failures.late(action, pending, seconds, f"cluster.{key}")
            # All that is there by now: Ray looks at every one that is pending each time, and may have thousands.
            done, pending = ray.wait(pending, num_returns=len(pending), timeout=0)
            try:
                answers |= zip(done, ray.get(done), strict=True)
            except ERRORS as error:
                failed = next(reference for reference in done if error_of(reference))
                others = [reference for reference in (*done, *pending) if reference != failed]
                raise self._failures.failed(action, failed, error, others) from None
        return [answers[reference] for reference in references]

    def logs_of(self, actor: Any) -> str:
        """Return where the output of an actor's processes lies, in words."""
        return self._failures.logs_of(actor._actor_id.hex())


def _nodes() -> dict[str, Node]:
    own = own_node()
    joined = sorted(joined_nodes(), key=lambda node: (node.id != own, node.address, node.id))
    return {node.id: node for node in joined}
