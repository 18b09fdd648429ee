"""The pool: engines as Ray actors. Requests reach them, and rollouts come of them, in source.py."""

import contextlib
import logging
import os
import uuid
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any

import ray

from astar_megatron.cluster import nodes
from astar_megatron.cluster.calls import Call
from astar_megatron.cluster.cluster import Cluster
from astar_megatron.cluster.errors import ClusterError
from astar_megatron.cluster.placement import Seat
from astar_megatron.config import RolloutConfig, SamplingConfig
from astar_megatron.rollout.engine import Engine, EngineOptions, Response, check_graphs, environment, graphs_of
from astar_megatron.rollout.start_log import StartLog
from astar_megatron.types import Request
from conversion.transfer.route import Place

_LOG = logging.getLogger(__name__)

type Stream = Any  # Ray's generator of what an engine answers to one call


class EngineActor(Engine):
    """An engine that writes its start log, by this name, among those of its node."""

    def __init__(self, *, log: str, options: EngineOptions) -> None:
        os.environ.update(StartLog.make(nodes.log_folder(), log).environment())
        super().__init__(options)


def _phase(log: str, has_graphs: bool) -> str:
    """What the engine of this node that writes `log` does."""
    return StartLog.of(nodes.log_folder(), log).phase(has_graphs=has_graphs)


class EnginePool:
    """`rollout.num_engines` engines of one model, in the seats that the cluster has reserved.

    Construction returns at once; `start` waits until all are ready. `graphs` says what they do beside running the model
    as it is.
    """

    def __init__(
        self,
        cluster: Cluster,
        rollout: RolloutConfig,
        *,
        model_path: str,
        dtype: str,
        max_tokens: int,
        stop_token_ids: tuple[int, ...],
        detokenize: Callable[[Sequence[int]], str],
        seed: int,
    ) -> None:
        on_gpu = cluster.num_gpus > 0
        check_graphs(rollout, on_gpu=on_gpu)
        graphs, self.graphs = graphs_of(rollout, on_gpu=on_gpu)
        self._has_graphs = on_gpu and graphs != "none"
        self.tensor = rollout.tensor
        self.max_num_seqs, self.detokenize = rollout.max_num_seqs, detokenize
        self._cluster = cluster
        options = EngineOptions(
            model_path=model_path,
            dtype=dtype,
            max_tokens=max_tokens,
            stop_token_ids=stop_token_ids,
            seed=seed,
            rollout=rollout,
            on_gpu=on_gpu,
        )
        pool = uuid.uuid4().hex[:8]  # a session may have several pools
        self._logs = [f"engine-{pool}-{index}" for index in range(rollout.num_engines)]
        seats = cluster.reservation.placement.engines
        threads = cluster.threads(seats, rollout.tensor)
        self._engines = [
            cluster.actor(
                "engine",
                index,
                EngineActor,
                env=_environment(cluster, rollout, seat, threads),
                seat=seat,
                concurrency=1000,
                log=log,
                options=options,
            )
            for index, (log, seat) in enumerate(zip(self._logs, seats, strict=True))
        ]
        self._starting = [self._begin(index, lambda engine: engine.start()) for index in range(len(self))]

    def __len__(self) -> int:
        return len(self._engines)

    def phase(self) -> str:
        """Return what the first engine that can't generate yet is doing."""
        _, starting = ray.wait(self._starting, num_returns=len(self._starting), timeout=0)
        if not starting:
            return ""
        index, phase = self._starting.index(starting[0]), "starting its process"
        with contextlib.suppress(ClusterError):  # it has not begun, or its node has just ended
            phase = self._cluster.beside(self._engines[index], _phase, self._logs[index], self._has_graphs)
        return f"engine {index}: {phase}"

    def start(self) -> None:
        """Wait until every engine can generate."""
        answers = self._cluster.wait("engines: start", self._starting, self._cluster.timeout_seconds)
        self._cluster.remember_shared_files()
        for left_out in dict.fromkeys(text for answer in answers for text in answer):
            _LOG.warning("not passed on to the engines: %s", left_out)

    def generate(self, engine: int, requests: Sequence[tuple[int, Request]], sampling: SamplingConfig) -> Stream:
        """Hand (tag, request) pairs to an engine and return at once; `responses` hears of them, each once."""
        return self._begin(engine, lambda actor: actor.generate(requests, sampling), num_returns="streaming")

    def responses(self, streams: Collection[Stream], seconds: float) -> list[tuple[Stream, list[Response] | None]]:
        """Wait at most so long, and return what the first stream to have something has; None: it has ended."""
        ready: list[Stream] = ray.wait(list(streams), num_returns=1, timeout=seconds)[0]
        if not ready:
            return []
        try:
            reference = next(ready[0])
        except StopIteration:
            if len(streams) == 1:
                self._cluster.remember_shared_files()  # the first requests make some
            return [(ready[0], None)]
        return [(ready[0], self._cluster.wait("engines: generate", [reference])[0])]

    def places(self) -> list[list[Place]]:
        """Return where the weights of each engine's workers are."""
        pairs = self._all(lambda engine: engine.places())
        return [[Place(memory=memory, device=device) for memory, device in workers] for workers in pairs]

    def open_update(self, init_info: dict[str, Any]) -> None:
        """Prepare every engine for updates; each hears which one it is."""
        calls = [
            self._begin(index, lambda engine, index=index: engine.open_update(init_info | {"engine": index}))
            for index in range(len(self))
        ]
        self._cluster.wait("engines: open_update", calls)

    def update(self, version: int, sending: Sequence[Any]) -> None:
        """Make every engine take over the weights that the calls `sending` send; ends when both sides are done."""
        calls = [self._begin(index, lambda engine: engine.update(version)) for index in range(len(self))]
        self._cluster.wait("publish", [*calls, *sending])

    def open_audit(self, config: dict[str, Any], dtype: str) -> None:
        """Prepare every engine to be audited on what it loaded by itself, until `open_update`; see conversion.vllm."""
        self._all(lambda engine: engine.open_audit(config, dtype))

    def audit(self, version: int) -> list[list[dict[str, Any]]]:
        """Return, of each engine, each worker's digests of the weights it holds; see conversion.vllm."""
        return self._all(lambda engine: engine.audit(version))

    def digest_rows(self, engine: int, worker: int, index: int) -> list[int]:
        """Return the digests of the rows of one part that a worker holds."""
        call = self._begin(engine, lambda engine: engine.digest_rows(index))
        return self._cluster.wait("engines: digest_rows", [call])[0][worker]

    def close(self) -> None:
        calls = [self._begin(index, lambda engine: engine.close()) for index in range(len(self))]
        self._cluster.close("engines: close", calls)

    def _all[T](self, call: Callable[[Engine], Awaitable[T]]) -> list[T]:
        """Make the call on all engines at once and return their answers."""
        calls = [self._begin(index, call) for index in range(len(self))]
        return self._cluster.wait(f"engines: {Call.of(call).method}", calls)

    def _begin(self, index: int, call: Callable[[Engine], Any], num_returns: int | str = 1) -> Any:
        heard = Call.of(call)
        method = getattr(self._engines[index], heard.method).options(num_returns=num_returns)
        return method.remote(*heard.arguments)


def _environment(cluster: Cluster, rollout: RolloutConfig, seat: Seat, threads: int) -> dict[str, str]:
    return environment(
        gpus=seat.gpus,
        threads=threads,
        tensor=rollout.tensor,
        kv_cache_gib=rollout.kv_cache_gib,
        socket_folder=cluster.socket_folder,
    )
