"""The Megatron ranks as one object: a Ray actor a rank, every call made on all of them at once.

The ranks' class is named, not imported: the driver needs neither megatron nor its six seconds of imports.
"""

import importlib
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from astar_megatron.algorithm.objective import Loss
from astar_megatron.cluster import nodes, session
from astar_megatron.cluster.calls import Call, stored
from astar_megatron.cluster.cluster import LOOPBACK, Cluster
from astar_megatron.cluster.stacks import show_on_signal
from astar_megatron.config import Offload
from astar_megatron.data.manifest import FileDigest
from astar_megatron.model.backend import environment, uses_transformer_engine
from astar_megatron.model.compute_type import ComputeType
from astar_megatron.model.layouts import layout_of
from astar_megatron.model.options import PolicyOptions
from astar_megatron.types import RolloutBatch, SaveState, StepOptions, StepStats, Trace
from conversion.transfer.route import Place, Route

if TYPE_CHECKING:
    from astar_megatron.model.policy import PolicyRank

_RANK_CLASS = ("astar_megatron.model.policy", "PolicyRank")


class _RankActor:
    """Forwards calls to a rank object that is built in the actor's own thread, where the CPU shim must be installed."""

    def __init__(self, rank: int, options: PolicyOptions) -> None:
        show_on_signal()
        session.name_semaphores()
        nodes.use_own_interface()
        module, name = _RANK_CLASS
        self._rank = getattr(importlib.import_module(module), name)(rank, options)

    def address(self) -> str:
        return nodes.address()

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self._rank, method)(*arguments)


class PolicyGroup:
    """Policy, reference and optimizer over `parallel.world_size` ranks, in the seats that the cluster has reserved.

    Construction returns at once; `start` waits. `gpu_share` is the part of its GPU's memory that a rank may take which
    has an engine beside it.
    """

    def __init__(self, cluster: Cluster, options: PolicyOptions, gpu_share: float = 1.0) -> None:
        self.dtype: ComputeType = options.dtype
        # Transformer Engine's layers hold the norms inside their linears.
        self.layout = layout_of(options.parallel, fused_norms=uses_transformer_engine(cluster.num_gpus))
        self._cluster = cluster
        self._calling = threading.Lock()  # every rank must hear the calls of several threads in the same order
        placement = cluster.reservation.placement
        threads = cluster.threads(placement.ranks)
        self._make_rank = [
            partial(
                cluster.actor,
                "policy rank",
                rank,
                _RankActor,
                env=environment(
                    gpus=seat.gpus,
                    threads=threads,
                    num_nodes=cluster.num_nodes,
                    dtype=options.dtype,
                    memory_share=gpu_share if is_shared else 1.0,
                ),
                seat=seat,
                rank=rank,
                options=options,
            )
            for rank, (seat, is_shared) in enumerate(zip(placement.ranks, placement.ranks_shared(), strict=True))
        ]
        self._ranks = [make() for make in self._make_rank]

    def start(self) -> str:
        """Build and load all ranks; returns in words what they run on."""
        timeout, host = self._cluster.timeout_seconds, LOOPBACK
        if self._cluster.num_nodes > 1:  # the rendezvous is rank 0's, wherever that runs
            (host,) = self._cluster.wait("policy: address", [self._ranks[0].address.remote()], timeout)
        port = self._ask(0, lambda rank: rank.listen(host), timeout)
        self.rendezvous = (host, port)
        reason = self._all(lambda rank: rank.start(host, port), timeout)[0]
        self._cluster.remember_processes(self._ranks)
        return reason

    def restart(self) -> None:
        """End all ranks, whatever they do, and start as many anew, with the weights of the model folder."""
        self._cluster.end(self._ranks)
        self._ranks = [make() for make in self._make_rank]
        self.start()

    def step(self, batch: RolloutBatch, loss: Loss, options: StepOptions) -> StepStats:
        """Train on one batch and return its statistics."""
        for_all = stored(batch)
        answers = self._all(lambda rank: rank.step(for_all, loss, options))
        return next(stats for stats in answers if stats is not None)

    def begin_profile(self) -> None:
        """Make every rank record what it computes until `end_profile`."""
        self._all(lambda rank: rank.begin_profile())

    def end_profile(self, folder: Path, step: int) -> list[Trace]:
        """Make every rank write what it has recorded to an existing or new folder; returns the file of each."""
        return self._all(lambda rank: rank.end_profile(str(folder.resolve()), step))

    def release(self, offload: Offload) -> list[tuple[int, int]]:
        """Make every rank give memory back until `resume`; returns of each what PolicyRank.release does."""
        return self._all(lambda rank: rank.release(offload))

    def resume(self) -> None:
        """Make every rank take its memory again."""
        self._all(lambda rank: rank.resume())

    def refresh_reference(self) -> None:
        """Make the reference a copy of the policy as it is."""
        self._all(lambda rank: rank.refresh_reference())

    def logprobs(self, token_ids: Sequence[Sequence[int]], prompt_tokens: Sequence[int]) -> list[list[float]]:
        """Return each response token's log-prob under the policy (nats)."""
        answers = self._all(lambda rank: rank.logprobs(token_ids, prompt_tokens))
        return next(rows for rows in answers if rows is not None)

    def places(self) -> list[Place]:
        """Return where each rank's weights are."""
        return self._all(lambda rank: rank.place())

    def open_publish(self, route: Route) -> None:
        """Prepare to send by `route`."""
        self._all(lambda rank: rank.open_publish(route))

    def begin_publish(self, version: int, senders: Sequence[int]) -> list[Any]:
        """Make these ranks begin to send the weights and return at once; the calls are for `cluster.wait`."""
        return self._begin(lambda rank: rank.publish(version), senders)

    def digests(self, senders: Sequence[int]) -> dict[int, list[int]]:
        """Return the digests of what each of these ranks publishes."""
        calls = self._begin(lambda rank: rank.digests(), senders)
        return dict(zip(senders, self._cluster.wait("policy: digests", calls), strict=True))

    def digest_rows(self, rank: int, index: int) -> list[int]:
        """Return the digests of the rows of one part that `rank` publishes."""
        return self._ask(rank, lambda rank: rank.digest_rows(index))

    def begin_save(self, folder: Path) -> dict[str, Any]:
        """Begin to write a checkpoint of the policy as it is to an empty folder; training may go on at once.

        Returns what its progress.json has to hold for `load`. Raises StorageError; then nothing is written.
        """
        return self._all(lambda rank: rank.begin_save(str(folder.resolve())))[0]

    def save_states(self, timeout_seconds: float | None = None, *, wait: bool = False) -> list[SaveState]:
        """Return how far each rank is with it; with `wait` when all are through. ClusterError: one is not, in time."""
        return self._all(lambda rank: rank.save_state(wait), timeout_seconds)

    def finish_save(self) -> dict[str, FileDigest]:
        """Complete the folder, which all ranks have written to, and return the digests of their files.

        Raises StorageError.
        """
        return {name: digest for part in self._all(lambda rank: rank.finish_save()) for name, digest in part.items()}

    def load(self, folder: Path, version: int) -> None:
        self._all(lambda rank: rank.load(str(folder.resolve()), version))

    def export(self, folder: Path, transfer_folder: Path) -> None:
        self._all(lambda rank: rank.export(str(folder.resolve()), str(transfer_folder)))

    def close(self) -> None:
        self._cluster.close("policy: close", self._begin(lambda rank: rank.close()))

    def _all[T](self, call: "Callable[[PolicyRank], T]", timeout_seconds: float | None = None) -> list[T]:
        """Make the call on all ranks at once and return their answers."""
        return self._cluster.wait(f"policy: {Call.of(call).method}", self._begin(call), timeout_seconds)

    def _ask[T](self, index: int, call: "Callable[[PolicyRank], T]", timeout_seconds: float | None = None) -> T:
        """Make the call on one rank and return its answer."""
        heard = Call.of(call)
        answer = self._ranks[index].call.remote(heard.method, *heard.arguments)
        return self._cluster.wait(f"policy: {heard.method}", [answer], timeout_seconds)[0]

    def _begin(self, call: "Callable[[PolicyRank], Any]", ranks: Sequence[int] | None = None) -> list[Any]:
        """Make the call on ranks (none named: all) and return at once."""
        heard, called = Call.of(call), self._ranks if ranks is None else [self._ranks[rank] for rank in ranks]
        with self._calling:
            return [rank.call.remote(heard.method, *heard.arguments) for rank in called]
