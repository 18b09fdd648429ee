"""Carries a plan out by point-to-point messages, between processes that share no memory: gloo or NCCL.

The two differ in the name of the backend and in where the buckets lie: gloo's on the host, NCCL's on the GPU of the
tensors. The processes of a publish are numbered policy ranks first, then the workers of engine 0, of engine 1 and so
on, and form a group of their own beside Megatron's and vLLM's. It is opened at the first send or receive, as the other
end is there then; each end only connects to those it has something for.

A bucket is one message to every receiver that wants it, and holds nothing that only others want. A sender has two
buffers and packs bucket k while bucket k - 1 is under way; a receiver has two and unpacks one while the next arrives. A
receiver takes the buckets in the order (number, source rank), a sender gives them in the order of numbers: whoever is
first in that order can always go on, so they can't wait for each other in a circle.

An end that fails leaves the group, which the others see at once, as they see a process that has been killed; so gloo.
NCCL sees it at its deadline. Tested with gloo between processes of one machine, also in two network
namespaces that share no memory; never run with NCCL.
"""

import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from conversion.plan import WeightPlan
from conversion.transfer import TransferError
from conversion.transfer.buckets import part, schedule, wanted
from conversion.transfer.pieces import placed, view

Way = Literal["shared memory", "cuda ipc", "gloo", "nccl"]


@dataclass(frozen=True, kw_only=True)
class World:
    """The processes of a publish; of gloo and NCCL also the TCPStore through which they find each other.

    `name` must be new for each group that meets at one store.
    """

    way: Way
    num_sources: int
    num_engines: int
    num_workers: int  # of an engine: the target ranks of the plan
    host: str = ""
    port: int = 0
    name: str = ""

    @property
    def size(self) -> int:
        """The number of processes."""
        return self.num_sources + self.num_engines * self.num_workers

    def worker(self, engine: int, rank: int) -> int:
        """The number of the process that is target rank `rank` of an engine."""
        if not (0 <= engine < self.num_engines and 0 <= rank < self.num_workers):
            raise ValueError(
                f"worker {rank} of engine {engine}: the group has {self.num_engines} engines of {self.num_workers}"
            )
        return self.num_sources + engine * self.num_workers + rank


class _Member:
    """One process's place in the group; opens it at the first message."""

    def __init__(self, world: World, number: int, tensors: Mapping[str, Tensor], timeout_seconds: float) -> None:
        self._world, self._number, self._group = world, number, None
        self._timeout = timedelta(seconds=timeout_seconds)
        on_gpu = world.way == "nccl"
        self.device = next(iter(tensors.values())).device if on_gpu and tensors else torch.device("cpu")
        self._left = False

    def send(self, payload: Tensor, peer: int) -> Any:
        """Begins a message to a process; the work to `wait` for."""
        return self._opened().send([payload], peer, 0)

    def receive(self, payload: Tensor, peer: int) -> Any:
        """Begins to take a message from a process; the work to `wait` for."""
        return self._opened().recv([payload], peer, 0)

    def wait(self, work: Any, peer: str, late: str) -> None:
        """Returns when a message has been sent or has come. TransferError as `failure`."""
        began = time.monotonic()
        try:
            work.wait(self._timeout)
        except RuntimeError as error:
            raise self.failure(error, began, peer, late) from error

    def failure(self, error: RuntimeError, began: float, peer: str, late: str) -> TransferError:
        """What an exchange with `peer` failed of: it is `late`, or the connection broke; torch's error is one for both.

        Whoever fails closes its connections, so a broken one does not say which process was the first.
        """
        seconds, allowed = time.monotonic() - began, self._timeout.total_seconds()
        if seconds < 0.99 * allowed:  # by two clocks
            return TransferError(
                f"the exchange with {peer} broke after {seconds:.1f} s: it, or a process that it waits for, has ended "
                f"or given up: {error}"
            )
        return TransferError(f"{peer} is late: it {late} in {allowed:.0f} s; its process hangs or has ended: {error}")

    def settle(self) -> None:
        """Returns when a GPU has made the copies it was given."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def leave(self) -> None:
        """Closes this end's connections: whoever waits for it hears so at once."""
        self._group, self._left = None, True

    def _opened(self) -> Any:
        if self._left:
            raise TransferError("an earlier send or receive failed, or this end is closed; open a new one")
        if self._group is None:
            world = self._world
            store = TCPStore(world.host, world.port, is_master=False, timeout=self._timeout)
            meeting = PrefixStore(world.name, store)
            self._group = _group(world, meeting, self._number, self._timeout, self.device)
        return self._group


def _group(world: World, store: Any, number: int, timeout: timedelta, device: torch.device) -> Any:
    if world.way == "gloo":
        from torch.distributed import ProcessGroupGloo  # pyright: ignore[reportPrivateImportUsage]

        gloo: Any = ProcessGroupGloo
        options = gloo._Options()
        # Of all addresses of this machine the one from which the store is reached, loopback if it is here.
        options._devices = [gloo.create_device(hostname=_own_address(world), lazy_init=True)]
        options._timeout = timeout
        return gloo(store, number, world.size, options)
    from torch.distributed import ProcessGroupNCCL  # pyright: ignore[reportPrivateImportUsage]  # not in a CPU's torch

    torch.cuda.set_device(device)
    options = ProcessGroupNCCL.Options()
    options._timeout = timeout
    # Its watchdog would end this whole process, a policy rank or an engine, for a message that is late: each `wait` has
    # the same deadline. With this it has none.
    with _variable("TORCH_NCCL_BLOCKING_WAIT", "1"):
        return ProcessGroupNCCL(store, number, world.size, options)


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """The environment has this variable."""
    before = os.environ.pop(name, None)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _own_address(world: World) -> str:
    family, kind, protocol, _, address = socket.getaddrinfo(world.host, world.port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)  # sends nothing
        return probe.getsockname()[0]


class GroupSender:
    """The end at one source rank."""

    def __init__(
        self,
        plan: WeightPlan,
        rank: int,
        tensors: Mapping[str, Tensor],
        world: World,
        dtype: torch.dtype,
        *,
        bucket_bytes: int,
        timeout_seconds: float,
    ) -> None:
        self._member = _Member(world, rank, tensors, timeout_seconds)
        order = schedule(plan, rank, dtype.itemsize, bucket_bytes, apart=True)
        targets = sorted({copy.target.rank for copy in plan.from_rank(rank)})
        takes = {target: wanted(plan, order, rank, target) for target in targets}
        self._rank, self._sizes = rank, order.sizes
        self._peers = [
            [
                (world.worker(engine, target), f"worker {target} of engine {engine}")
                for engine in range(world.num_engines)
                for target in targets
                if number in takes[target]
            ]
            for number in range(len(order.buckets))
        ]
        self._slots = [
            torch.empty(order.slot_bytes, dtype=torch.uint8, device=self._member.device) for _ in range(order.num_slots)
        ]
        self._copies = [
            [
                (source, placed(self._slots[number % 2], f.offset, source, dtype))
                for f in bucket
                for source in (view(tensors, part(f.piece, f.box)),)
            ]
            for number, bucket in enumerate(order.buckets)
        ]

    def send(self, version: int = 0) -> None:
        """Sends bucket after bucket, the version first; returns when the last has arrived. TransferError."""
        under_way: list[list[tuple[Any, str]]] = [[], []]
        try:
            self._send(version, under_way)
        except BaseException:
            self._member.leave()
            raise

    @torch.no_grad()
    def _send(self, version: int, under_way: list[list[tuple[Any, str]]]) -> None:
        told: set[int] = set()
        first = torch.tensor([version], device=self._member.device)
        for number in range(len(self._copies)):
            self._finish(under_way[number % 2])
            self._pack(number)
            payload = self._slots[number % 2][: self._sizes[number]]
            for peer, name in self._peers[number]:
                messages = [payload] if peer in told else [first, payload]
                told.add(peer)
                try:
                    under_way[number % 2] += [(self._member.send(message, peer), name) for message in messages]
                except TransferError:
                    raise
                except RuntimeError as error:
                    raise TransferError(f"{name} can not be reached by source rank {self._rank}: {error}") from error
        for works in under_way:
            self._finish(works)

    def _pack(self, number: int) -> None:
        for source, place in self._copies[number]:
            place.copy_(source)

    def _finish(self, works: list[tuple[Any, str]]) -> None:
        for work, name in works:
            self._member.wait(work, name, f"does not take what source rank {self._rank} sends")
        works.clear()

    def close(self) -> None:
        """Leaves the group and lets go of the buffers."""
        self._member.leave()
        self._slots, self._copies = [], []


class GroupReceiver:
    """The end at one target rank of one engine."""

    def __init__(
        self,
        plan: WeightPlan,
        rank: int,
        tensors: Mapping[str, Tensor],
        world: World,
        dtype: torch.dtype,
        *,
        bucket_bytes: int,
        engine: int,
        timeout_seconds: float,
    ) -> None:
        self._member = _Member(world, world.worker(engine, rank), tensors, timeout_seconds)
        sources = sorted({copy.source.rank for copy in plan.to_rank(rank)})
        orders = {source: schedule(plan, source, dtype.itemsize, bucket_bytes, apart=True) for source in sources}
        takes = {source: wanted(plan, orders[source], source, rank) for source in sources}
        arrivals = sorted((number, source) for source in sources for number in takes[source])
        largest = max((orders[source].sizes[number] for number, source in arrivals), default=0)
        slots = min(2, len(arrivals))
        self._slots = [torch.empty(largest, dtype=torch.uint8, device=self._member.device) for _ in range(slots)]
        self._arrivals = []
        for turn, (number, source) in enumerate(arrivals):
            slot = self._slots[turn % 2]
            copies = [
                (target, placed(slot, offset, target, dtype))
                for offset, piece in takes[source][number]
                for target in (view(tensors, piece),)
            ]
            self._arrivals.append((source, slot[: orders[source].sizes[number]], copies))

    def receive(self, version: int = 0) -> None:
        """Takes one send of every source rank into the tensors. TransferError."""
        try:
            self._receive(version)
        except BaseException:
            self._member.leave()
            raise

    @torch.no_grad()
    def _receive(self, version: int) -> None:
        begun: set[int] = set()
        under_way = None
        for turn, (source, _, copies) in enumerate(self._arrivals):
            work = under_way or self._begin(turn, begun, version)
            self._member.wait(work, f"source rank {source}", "does not send its bucket")
            following = turn + 1 < len(self._arrivals)
            under_way = self._begin(turn + 1, begun, version) if following else None
            for target, place in copies:
                target.copy_(place)
        self._member.settle()

    def _begin(self, turn: int, begun: set[int], version: int) -> Any:
        (source, payload, _), began = self._arrivals[turn], time.monotonic()
        try:
            if source not in begun:
                begun.add(source)
                first = torch.zeros(1, dtype=torch.int64, device=self._member.device)
                self._member.wait(
                    self._member.receive(first, source), f"source rank {source}", "does not begin to send"
                )
                if (sent_version := int(first)) != version:
                    raise TransferError(f"source rank {source} sends version {sent_version}, expected {version}")
            return self._member.receive(payload, source)
        except TransferError:
            raise
        except RuntimeError as error:
            raise self._member.failure(error, began, f"source rank {source}", "does not answer") from error

    def close(self) -> None:
        """Leaves the group and lets go of the buffers."""
        self._member.leave()
        self._slots, self._arrivals = [], []
