"""What the links between nodes carry: an all-reduce of two nodes at a time, over NCCL where both have a GPU, else gloo.

Each node meets a few partners, one after the other; the others do so at the same time. A node's bandwidth is that with
its best partner, so that a slow partner does not make it slow. Of two nodes alone nobody can say which is the slow one.
"""

import contextlib
import socket
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from astar_megatron.cluster import nodes as own
from astar_megatron.cluster.placement import Node
from astar_megatron.cluster.survey import Answers, answers

_PARTNERS = 3
_ROUNDS = 3  # of which the quickest counts
_BYTES = {"gloo": 32 << 20, "nccl": 256 << 20}
_START_SECONDS = 120.0  # each node imports torch
_SECONDS = 60.0  # for two nodes to meet and measure


class LinkEnd:
    """An actor: one end of a link."""

    def __init__(self, collective: str) -> None:
        torch.set_num_threads(1)
        self._collective = collective
        self._device = torch.accelerator.current_accelerator() if collective == "nccl" else torch.device("cpu")

    def listen(self) -> str:
        """Return where the other end finds this one, host:port."""
        host = own.address()
        family = socket.getaddrinfo(host, None)[0][0]
        listener = socket.create_server((host, 0), family=family)  # the store's own would listen on all interfaces
        port = listener.getsockname()[1]
        self._store = TCPStore(
            host, port, 2, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        return f"{host}:{port}"

    def measure(self, address: str | None) -> float:
        """Return the bytes a second of an all-reduce with the other end: the one at `address`, or who comes here."""
        if self._collective == "gloo":
            own.use_own_interface()
        if address:
            host, _, port = address.rpartition(":")
            self._store = TCPStore(host, int(port), 2, is_master=False)
        time_limit = timedelta(seconds=_SECONDS)
        dist.init_process_group(
            self._collective, store=self._store, rank=int(address is not None), world_size=2, timeout=time_limit
        )
        try:
            numbers = torch.ones(_BYTES[self._collective] // 4, device=self._device)
            return max(self._bytes_a_second(numbers) for _ in range(_ROUNDS + 1))
        finally:
            dist.destroy_process_group()

    def _bytes_a_second(self, numbers: torch.Tensor) -> float:
        begun = time.perf_counter()
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        if self._collective == "nccl":
            torch.accelerator.synchronize()
        return numbers.numel() * 4 / (time.perf_counter() - begun)


def pairings(num_nodes: int) -> list[list[tuple[int, int]]]:
    """Return rounds of pairs: in each everyone is in one at most, and none comes twice (a tournament's circle)."""
    circle: list[int | None] = [*range(num_nodes), *([None] if num_nodes % 2 else [])]
    rounds = []
    for _ in range(min(_PARTNERS, len(circle) - 1)):
        half = len(circle) // 2
        pairs = zip(circle[:half], reversed(circle[half:]), strict=True)
        rounds.append([(a, b) for a, b in pairs if a is not None and b is not None])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return rounds


def bandwidths(nodes: Mapping[str, Node]) -> tuple[str, Answers[float]]:
    """Return the collective's name, and by node its bytes a second with its best partner; a string: why there is none.

    Nothing is measured of a node alone.
    """
    collective = "nccl" if nodes and all(node.num_gpus for node in nodes.values()) else "gloo"
    if len(nodes) < 2:
        return collective, {}
    ends = {name: _end(node, collective) for name, node in nodes.items()}
    begun = answers({name: end.listen.remote() for name, end in ends.items()}, _START_SECONDS)
    best: Answers[float] = {name: place for name, place in begun.items() if not _is_address(place)}
    names = [name for name in ends if name not in best]
    for pairs in pairings(len(names)):
        measured = _meet(ends, [(names[a], names[b]) for a, b in pairs])
        for name, speed in measured.items():
            known = best.get(name)
            if isinstance(speed, str):
                best.setdefault(name, speed)
            else:
                best[name] = max(known, speed) if isinstance(known, float) else speed
    for end in ends.values():
        with contextlib.suppress(RayError):
            ray.kill(end)
    return collective, best


def _meet(ends: Mapping[str, Any], pairs: Sequence[tuple[str, str]]) -> Answers[float]:
    """One round: what each of the pairs measures."""
    places = answers({first: ends[first].listen.remote() for first, _ in pairs}, _SECONDS)
    calls = {}
    for first, second in pairs:
        if _is_address(places[first]):
            calls[first] = ends[first].measure.remote(None)
            calls[second] = ends[second].measure.remote(places[first])
    return {name: place for name, place in places.items() if not _is_address(place)} | answers(calls, _SECONDS)


def _is_address(answer: str) -> bool:
    """Whether a node has said where it listens, and not why it does not."""
    return answer.rpartition(":")[2].isdecimal() and " " not in answer


def _end(node: Node, collective: str) -> Any:
    options: dict[str, Any] = {"num_cpus": 0, "num_gpus": 1 if collective == "nccl" else 0}
    options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node.id, soft=False)
    return ray.remote(**options)(LinkEnd).remote(collective)
