"""Carries a plan out by point-to-point messages of torch.distributed, between processes that share no memory.

The same buckets as in shared memory, one message each to every receiver that wants something of it. A sender has two
buffers and packs bucket k while bucket k - 1 is under way; a receiver has two and unpacks one while the next arrives.
A receiver takes the buckets in the order (number, source rank), a sender gives them in the order of numbers: whoever
is first in that order can always go on, so they can't wait for each other in a circle.

Run with gloo, on tensors of the host. Not run with another backend.
"""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from conversion.plan import WeightPlan
from conversion.transfer import TransferError, view
from conversion.transfer.buckets import BUCKET_BYTES, part, schedule, wanted

TIMEOUT_SECONDS = 120.0


class GlooSender:
    """The end at one source rank. `peers`: the process that is target rank t, in each engine: `peers[engine][t]`."""

    def __init__(
        self,
        plan: WeightPlan,
        rank: int,
        tensors: Mapping[str, Tensor],
        peers: Sequence[Mapping[int, int]],
        dtype: torch.dtype = torch.float32,
        *,
        bucket_bytes: int = BUCKET_BYTES,
        group: Any = None,
        timeout_seconds: float = TIMEOUT_SECONDS,
    ) -> None:
        order = schedule(plan, rank, dtype.itemsize, bucket_bytes)
        targets = sorted({copy.target.rank for copy in plan.from_rank(rank)})
        takes = {target: wanted(plan, order, rank, target) for target in targets}
        self._rank, self._sizes, self._group = rank, order.sizes, group
        self._timeout = timedelta(seconds=timeout_seconds)
        self._peers = [
            [
                (peer[target], f"worker {target} of engine {e}")
                for e, peer in enumerate(peers)
                for target in targets
                if number in takes[target]
            ]
            for number in range(len(order.buckets))
        ]
        self._slots = [torch.empty(order.slot_bytes, dtype=torch.uint8) for _ in range(order.num_slots)]
        self._copies = [
            [
                (source, _placed(self._slots[number % 2], f.offset, source, dtype))
                for f in bucket
                for source in (view(tensors, part(f.piece, f.box)),)
            ]
            for number, bucket in enumerate(order.buckets)
        ]

    @property
    def total_bytes(self) -> int:
        """Bytes this rank packs at each send; it sends them to every receiver that wants them."""
        return sum(self._sizes)

    @property
    def held_bytes(self) -> int:
        """Bytes of buffers this rank holds."""
        return sum(slot.nbytes for slot in self._slots)

    @torch.no_grad()
    def send(self, version: int = 0) -> None:
        """Sends bucket after bucket, the version first; returns when the last has arrived. TransferError."""
        under_way: list[list[tuple[Any, str]]] = [[], []]
        told: set[int] = set()
        first = torch.tensor([version])
        for number, copies in enumerate(self._copies):
            self._finish(under_way[number % 2])
            for source, place in copies:
                place.copy_(source)
            payload = self._slots[number % 2][: self._sizes[number]]
            for peer, name in self._peers[number]:
                try:
                    if peer not in told:
                        told.add(peer)
                        under_way[number % 2].append((dist.isend(first, peer, group=self._group), name))
                    under_way[number % 2].append((dist.isend(payload, peer, group=self._group), name))
                except RuntimeError as error:
                    raise TransferError(f"{name} can not be reached by source rank {self._rank}: {error}") from error
        for works in under_way:
            self._finish(works)

    def _finish(self, works: list[tuple[Any, str]]) -> None:
        for work, name in works:
            _wait(work, self._timeout, f"{name} is late: it does not take what source rank {self._rank} sends")
        works.clear()

    def close(self) -> None:
        """Lets go of the buffers."""
        self._slots, self._copies = [], []


class GlooReceiver:
    """The end at one target rank of one engine. `peers`: the process that is source rank s."""

    def __init__(
        self,
        plan: WeightPlan,
        rank: int,
        tensors: Mapping[str, Tensor],
        peers: Mapping[int, int],
        dtype: torch.dtype = torch.float32,
        *,
        bucket_bytes: int = BUCKET_BYTES,
        group: Any = None,
        timeout_seconds: float = TIMEOUT_SECONDS,
    ) -> None:
        self._group, self._timeout = group, timedelta(seconds=timeout_seconds)
        sources = sorted({copy.source.rank for copy in plan.to_rank(rank)})
        orders = {source: schedule(plan, source, dtype.itemsize, bucket_bytes) for source in sources}
        largest = max((order.slot_bytes for order in orders.values()), default=0)
        self._slots = [torch.empty(largest, dtype=torch.uint8) for _ in range(2)]
        takes = {source: wanted(plan, orders[source], source, rank) for source in sources}
        arrivals = sorted((number, source) for source in sources for number in takes[source])
        self._arrivals = []
        for turn, (number, source) in enumerate(arrivals):
            slot = self._slots[turn % 2]
            copies = [
                (target, _placed(slot, offset, target, dtype))
                for offset, piece in takes[source][number]
                for target in (view(tensors, piece),)
            ]
            self._arrivals.append((source, peers[source], slot[: orders[source].sizes[number]], copies))

    @property
    def held_bytes(self) -> int:
        """Bytes of buffers this rank holds."""
        return sum(slot.nbytes for slot in self._slots)

    @torch.no_grad()
    def receive(self, version: int = 0) -> None:
        """Takes one send of every source rank into the tensors. TransferError."""
        begun: set[int] = set()
        under_way = None
        for turn, (source, _, _, copies) in enumerate(self._arrivals):
            work = under_way or self._begin(turn, begun, version)
            _wait(work, self._timeout, f"source rank {source} is late: its bucket does not come")
            following = turn + 1 < len(self._arrivals)
            under_way = self._begin(turn + 1, begun, version) if following else None
            for target, place in copies:
                target.copy_(place)

    def _begin(self, turn: int, begun: set[int], version: int) -> Any:
        source, peer, payload, _ = self._arrivals[turn]
        try:
            if source not in begun:
                begun.add(source)
                got = torch.zeros(1, dtype=torch.int64)
                late = f"source rank {source} is late: it does not begin to send"
                _wait(dist.irecv(got, peer, group=self._group), self._timeout, late)
                if int(got) != version:
                    raise TransferError(f"source rank {source} sends version {int(got)}, expected {version}")
            return dist.irecv(payload, peer, group=self._group)
        except TransferError:
            raise
        except RuntimeError as error:
            raise TransferError(f"source rank {source} can not be reached: {error}") from error

    def close(self) -> None:
        """Lets go of the buffers."""
        self._slots, self._arrivals = [], []


def _placed(slot: Tensor, offset: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    return slot[offset : offset + like.numel() * dtype.itemsize].view(dtype).view(like.shape)


def _wait(work: Any, timeout: timedelta, late: str) -> None:
    try:
        work.wait(timeout)
    except RuntimeError as error:
        raise TransferError(f"{late} in {timeout.total_seconds():.0f} s, or its process has ended: {error}") from error
