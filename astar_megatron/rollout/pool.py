"""The pool: engines as Ray actors, prompts in, rollouts out.

Every response has a seed of its own, a digest of (run, prompt, sample or step), so any subset of a sweep reproduces
and no two prompts share their random numbers.
"""

import hashlib
import logging
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import ray

from astar_megatron.cluster.cluster import Cluster, gpus_asked
from astar_megatron.config import RolloutConfig, SamplingConfig
from astar_megatron.rollout.engine import (
    Engine,
    EngineOptions,
    Request,
    Response,
    check_graphs,
    environment,
    graphs_of,
)
from astar_megatron.rollout.feed import Feed, Item
from astar_megatron.rollout.start_log import StartLog
from astar_megatron.types import Rollout
from conversion.transfer.route import Place

_LOG = logging.getLogger(__name__)


class Detokenize(Protocol):
    def __call__(self, token_ids: Sequence[int], /) -> str: ...


def seed_of(run_seed: int, *what: object) -> int:
    """Return the 63-bit seed of one response; `what` names it, for example (uid, "sweep", sample)."""
    text = "\x00".join(str(part) for part in (run_seed, *what))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


class EnginePool:
    """`rollout.num_engines` engines of one model. Construction returns at once; `start` waits until all are ready.

    `graphs` says what they do beside running the model as it is. With `shares_gpu` the only engine has a policy rank
    beside it on its GPU.
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
        detokenize: Detokenize,
        seed: int,
        shares_gpu: bool = False,
    ) -> None:
        on_gpu = cluster.num_gpus > 0
        check_graphs(rollout, on_gpu=on_gpu)
        graphs, self.graphs = graphs_of(rollout, on_gpu=on_gpu)
        self._has_graphs = on_gpu and graphs != "none"
        self.tensor = rollout.tensor
        self._max_num_seqs = rollout.max_num_seqs
        self._cluster, self._detokenize = cluster, detokenize
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
        names = [f"engine-{pool}-{index}" for index in range(rollout.num_engines)]
        self._logs = [StartLog.make(cluster.log_folder, name) for name in names]
        env = _environment(cluster, rollout)
        self._engines = [
            cluster.actor(
                "engine",
                index,
                Engine,
                env=env | log.environment(),
                num_gpus=gpus_asked(cluster.num_gpus, rollout.tensor, shared=shares_gpu),
                concurrency=1000,
                options=options,
            )
            for index, log in enumerate(self._logs)
        ]
        self._starting = [engine.start.remote() for engine in self._engines]

    def __len__(self) -> int:
        return len(self._engines)

    def phase(self) -> str:
        """Return what the first engine that can't generate yet is doing."""
        _, starting = ray.wait(self._starting, num_returns=len(self._starting), timeout=0)
        if not starting:
            return ""
        index = self._starting.index(starting[0])
        return f"engine {index}: {self._logs[index].phase(has_graphs=self._has_graphs)}"

    def start(self) -> None:
        """Wait until every engine can generate."""
        answers = self._cluster.wait("engines: start", self._starting, self._cluster.timeout_seconds)
        self._cluster.remember_shared_files()
        for left_out in dict.fromkeys(text for answer in answers for text in answer):
            _LOG.warning("not passed on to the engines: %s", left_out)

    def generate(
        self, work: Iterable[Item], sampling: SamplingConfig, *, greedy: bool = False
    ) -> Iterator[list[tuple[int, Rollout]]]:
        """Yield (index in `work`, rollout) as they finish, every one once; `work` is (prompt, sample, seed) each.

        `work` is asked for more whenever an engine's queue runs low, so it may be endless, and no engine idles while
        there is some. Samples of one prompt that follow each other go to one engine, which computes their common
        prefix once.
        """
        feed, streams = Feed(work, len(self._engines), self._max_num_seqs), {}
        while True:
            for engine, share in feed.due():
                requests = [Request(tag=tag, token_ids=item[0].token_ids, seed=item[2]) for tag, item in share]
                call = self._engines[engine].generate.options(num_returns="streaming")
                streams[call.remote(requests, sampling, greedy)] = engine
            if not streams:
                self._cluster.remember_shared_files()  # the first requests make some
                return
            ready, _ = ray.wait(list(streams), num_returns=1)
            for stream in ready:
                try:
                    reference = next(stream)  # pyright: ignore[reportArgumentType]
                except StopIteration:
                    del streams[stream]
                    continue
                (responses,) = self._cluster.wait("engines: generate", [reference])
                answers = [(one.tag, feed.answered(streams[stream], one.tag), one) for one in responses]
                yield [(tag, self._rollout(item, response)) for tag, item, response in answers]

    def _rollout(self, item: Item, response: Response) -> Rollout:
        prompt, sample, seed = item
        return Rollout(
            prompt=prompt,
            sample=sample,
            seed=seed,
            token_ids=response.token_ids,
            text=self._detokenize(response.token_ids),
            truncated=response.truncated,
            logprob=response.logprob,
            version=response.version,
        )

    def greedy(self, token_ids: Sequence[int], max_tokens: int, engine: int = 0) -> tuple[list[int], list[float]]:
        """Return a greedy continuation and the prompt's log-probs from its second token on (nats)."""
        call = self._engines[engine].greedy.remote(list(token_ids), max_tokens)
        return self._cluster.wait(f"engine {engine}: greedy", [call])[0]

    def places(self) -> list[list[Place]]:
        """Return where the weights of each engine's workers are."""
        return [[Place(memory=memory, device=device) for memory, device in engine] for engine in self._all("places")]

    def open_update(self, init_info: dict[str, Any]) -> None:
        """Prepare every engine for updates; each hears which one it is."""
        calls = [engine.open_update.remote(init_info | {"engine": i}) for i, engine in enumerate(self._engines)]
        self._cluster.wait("engines: open_update", calls)

    def update(self, version: int, sending: Sequence[Any]) -> None:
        """Make every engine take over the weights that the calls `sending` send; ends when both sides are done."""
        calls = [engine.update.remote(version) for engine in self._engines]
        self._cluster.wait("publish", [*calls, *sending])

    def open_audit(self, config: dict[str, Any], dtype: str) -> None:
        """Prepare every engine to be audited on what it loaded by itself, until `open_update`; see conversion.vllm."""
        self._all("open_audit", config, dtype)

    def audit(self, version: int) -> list[list[dict[str, Any]]]:
        """Return, of each engine, each worker's digests of the weights it holds; see conversion.vllm."""
        return self._all("audit", version)

    def digest_rows(self, engine: int, worker: int, index: int) -> list[int]:
        """Return the digests of the rows of one part that a worker holds."""
        (answers,) = self._cluster.wait("engines: digest_rows", [self._engines[engine].digest_rows.remote(index)])
        return answers[worker]

    def close(self) -> None:
        self._cluster.close("engines: close", [engine.close.remote() for engine in self._engines])

    def _all(self, method: str, *args: Any) -> list[Any]:
        calls = [getattr(engine, method).remote(*args) for engine in self._engines]
        return self._cluster.wait(f"engines: {method}", calls)


def _environment(cluster: Cluster, rollout: RolloutConfig) -> dict[str, str]:
    return environment(
        on_gpu=cluster.num_gpus > 0,
        threads=cluster.threads(rollout.num_engines * rollout.tensor),
        tensor=rollout.tensor,
        kv_cache_gib=rollout.kv_cache_gib,
        num_nodes=cluster.num_nodes,
        socket_folder=cluster.socket_folder,
    )
