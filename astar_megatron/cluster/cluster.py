"""Ray: started on this machine when no address is given, joined when one is; actors are placed here and nowhere else.

Leaves out what only several nodes need: placement by node, replacement of dead actors.
"""

import contextlib
import logging
import os
import re
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ray
from ray._private.worker import global_worker
from ray.exceptions import ActorDiedError, RayActorError, RayTaskError

from astar_megatron.cluster.cores import available_cores
from astar_megatron.cluster.errors import ClusterError
from astar_megatron.config import ClusterConfig

OBJECT_STORE_BYTES = 256 << 20  # prompts and rollouts are small; weights do not pass through it
_LOOPBACK = "127.0.0.1"
_CLOSE_SECONDS = 20.0


class Cluster:
    """The Ray session of a run. A context manager: what it started ends with it."""

    def __init__(self, cfg: ClusterConfig) -> None:
        self._cfg = cfg
        self._actors: list[tuple[str, Any]] = []
        self.num_nodes, self.num_gpus = 0, 0

    def __enter__(self) -> Self:
        logging.getLogger("ray").setLevel(logging.ERROR)
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
        if self._cfg.address:
            if (Path.home() / ".ray" / "auth_token").is_file():
                os.environ.setdefault("RAY_AUTH_MODE", "token")  # `ray start` turns it on by itself, joining does not
            try:
                _knock(self._cfg.address)
                ray.init(address=self._cfg.address, **common)
            except (OSError, RuntimeError, ValueError) as error:
                raise ClusterError(
                    f"cluster.address: no Ray cluster answers at {self._cfg.address!r} ({error}); "
                    "start one with `ray start --head`, or leave the key out to start one here. If one runs there, "
                    "it wants its token: copy it to ~/.ray/auth_token (RAY_AUTH_MODE=disabled where it has none)"
                ) from None
        else:
            # Ray listens on all interfaces; since 2.60 it turns token authentication on by itself for such a session.
            ray.init(address="local", include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **common)
        self.num_nodes = sum(node["Alive"] for node in ray.nodes())
        if self.num_nodes > 1:
            ray.shutdown()
            raise ClusterError(
                f"cluster.address: the Ray cluster has {self.num_nodes} nodes; the ways of weights between nodes (gloo "
                "and NCCL) have run within one machine only so far: join a cluster of one node"
            )
        self.num_gpus = int(ray.cluster_resources().get("GPU", 0))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for _, actor in self._actors:
            with contextlib.suppress(RayActorError):
                ray.kill(actor)
        self._actors.clear()
        ray.shutdown()

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

    def threads(self, actors_on_this_side: int) -> int:
        """CPU threads of one actor: `cluster.threads`, or the machine's cores shared among the actors of a side.

        Policy and engines take turns, so each side may use all cores.
        """
        return self._cfg.threads or max(1, int(available_cores()) // actors_on_this_side)

    def close(self, what: str, references: Sequence[Any]) -> None:
        """Wait a little for actors to end in order; whatever stands in the way, leaving the session kills them."""
        with contextlib.suppress(ClusterError, ValueError):
            self.wait(what, references, _CLOSE_SECONDS)

    def actor(
        self,
        name: str,
        cls: type,
        *,
        env: Mapping[str, str],
        num_gpus: float,
        concurrency: int | None = None,
        **init: Any,
    ) -> Any:
        """Start an actor of `cls` and return its handle at once; `name` stands in error messages.

        It asks for no logical CPUs: a laptop with two could otherwise not schedule a policy and an engine.
        """
        options: dict[str, Any] = {"num_cpus": 0, "num_gpus": num_gpus, "runtime_env": {"env_vars": dict(env)}}
        if concurrency:
            options["max_concurrency"] = concurrency
        handle = ray.remote(cls).options(**options).remote(**init)
        self._actors.append((name, handle))
        return handle

    def wait(self, what: str, references: Sequence[Any], timeout_seconds: float | None = None) -> list[Any]:
        """Return the results of actor calls; raises ClusterError that says `what` failed and why.

        The first failure ends the wait: the other ranks may hang in a collective that can't complete any more.
        """
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        pending = list(references)
        try:
            while pending:
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                done, pending = ray.wait(pending, timeout=left)
                if not done:
                    raise ClusterError(
                        f"{what}: no answer in {timeout_seconds:.0f} s; raise cluster.start_timeout_seconds on a slow "
                        f"machine. The output of its processes lies in {_log_folder()}"
                    )
                ray.get(done)
            return ray.get(list(references))
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, ValueError):  # a wrong input that only the actor could see: its message says it all
                raise cause from None
            raise ClusterError(
                f"{what}: {_plain(error)}\nThe output of its processes lies in {_log_folder()}"
            ) from None
        except (ActorDiedError, RayActorError) as error:
            raise ClusterError(
                f"{what}: the process ended ({_plain(error)}); its output lies in {_log_folder()}"
            ) from None


def gpus_asked(num_gpus: int, workers: int, *, shared: bool) -> float:
    """Return how many GPUs an actor of so many `workers` asks Ray for, in a cluster that has `num_gpus`.

    An actor that shares a GPU with one other asks for half of it, whatever memory it gets: Ray counts no bytes.
    """
    if not num_gpus:
        return 0
    return 0.5 if shared else workers


def _plain(error: Exception) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", str(error))


def _log_folder() -> str:
    node = global_worker.node
    return node.get_logs_dir_path() if node else "the logs of Ray's session"


def _knock(address: str) -> None:
    """Raise OSError if nothing listens at host:port; Ray itself would try for minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=10).close()
