"""Which node and which GPUs each policy rank and each engine gets. Pure: nothing is started, nobody is asked.

1. The ranks of a tensor-parallel group (consecutive ranks) are on one node, and the workers of an engine are.
2. Apart: each rank and each engine worker has a GPU of its own. Nodes are filled in their order, each with as many
   tensor groups as leave room for everything else, then with as many engines.
3. Shared: ranks and engine workers both begin at the first GPU of each node. Whichever side has fewer processes goes
   beside the other as far as its groups fit there, and what is left of it gets GPUs of its own.
4. `cluster.share_gpus`: false is apart, true is shared, null is apart where that fits and else shared.
5. Where no node has a GPU, tensor groups and then engines are dealt to the nodes by turns, in their order.

Leaves out: whether the memory of a shared GPU holds both (run/accelerators.py); what holds the GPUs (reservation.py).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from astar_megatron.config import ParallelConfig, RolloutConfig


class PlacementError(ValueError):
    """The ranks and engines of a run don't fit the nodes; the message has the numbers and the nearest that fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A machine of the cluster; `id` is Ray's, `name` that of `ray start --node-name`, both empty before Ray runs."""

    address: str
    num_gpus: int
    id: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """Where a process is, and which GPUs of the node it sees: counted from 0, or by name once Ray has given them."""

    node: Node
    gpus: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The seat of each policy rank, and of each engine with a GPU for each of its workers."""

    nodes: tuple[Node, ...]
    ranks: tuple[Seat, ...]
    engines: tuple[Seat, ...]

    def gpus(self) -> dict[Node, list[str]]:
        """Return the GPUs that the run has on each node, in their order, each once."""
        gpus: dict[Node, list[str]] = {node: [] for node in self.nodes}
        for node, gpu in self._processes():
            gpus[node] += [gpu] if gpu else []
        return {node: sorted(names, key=lambda gpu: (len(gpu), gpu)) for node, names in gpus.items()}

    @property
    def shared(self) -> frozenset[tuple[Node, str]]:
        """The GPUs that have both a rank and a worker of an engine."""
        return frozenset(
            (node, gpu)
            for (node, gpu), names in self._processes().items()
            if gpu and {name.split()[0] for name in names} == {"rank", "engine"}
        )

    def ranks_shared(self) -> list[bool]:
        """Return of each rank whether an engine is on a GPU of its seat too."""
        shared = self.shared
        return [any((seat.node, gpu) in shared for gpu in seat.gpus) for seat in self.ranks]

    def _processes(self) -> dict[tuple[Node, str], list[str]]:
        """By GPU, or by node with "" where there is none: the names of the processes there."""
        names: dict[tuple[Node, str], list[str]] = {}
        for kind, seats in (("rank", self.ranks), ("engine", self.engines)):
            for index, seat in enumerate(seats):
                for gpu in seat.gpus or ("",):
                    names.setdefault((seat.node, gpu), []).append(f"{kind} {index}")
        return names

    def numbered(self, gpus: Mapping[str, Sequence[str]]) -> "Placement":
        """Return the placement with the GPUs that each node, by Ray's id, has in place of 0, 1, ..."""

        def named(seat: Seat) -> Seat:
            return replace(seat, gpus=tuple(gpus[seat.node.id][int(gpu)] for gpu in seat.gpus))

        return replace(self, ranks=tuple(map(named, self.ranks)), engines=tuple(map(named, self.engines)))

    def describe(self) -> str:
        """Return in one line how many of what are where."""
        where = self._processes()
        ranks = f"{counted(len(self.ranks), 'policy rank')} and " if self.ranks else ""
        nodes = counted(len({node for node, _ in where}), "node")
        processes, used = f"{ranks}{counted(len(self.engines), 'engine')}", sum(1 for _, gpu in where if gpu)
        if not used:
            return f"{processes} on the cores of {nodes}"
        total = sum(node.num_gpus for node in self.nodes)
        return f"{processes} on {used} of {counted(total, 'GPU')}, {nodes}; {len(self.shared) or 'none'} shared"

    def rows(self) -> list[tuple[str, str]]:
        """Return a table: each GPU, or each node without one, and who is there."""
        rows, where = [], self._processes()
        for node, gpus in self.gpus().items():
            rows += [(f"{node.address} GPU {gpu}", ", ".join(where[node, gpu])) for gpu in gpus]
            if names := where.get((node, "")):
                rows.append((node.address, ", ".join(names)))
            if len(gpus) < node.num_gpus:
                rows.append((node.address, f"{counted(node.num_gpus - len(gpus), 'GPU')} idle"))
        return rows

    def fields(self) -> dict[str, Any]:
        """Return the placement as JSON has it."""
        ranks, engines = (
            [{"node": seat.node.address, "gpus": list(seat.gpus)} for seat in side]
            for side in (self.ranks, self.engines)
        )
        nodes = [{"address": node.address, "num_gpus": node.num_gpus} for node in self.nodes]
        return {"nodes": nodes, "ranks": ranks, "engines": engines}


@dataclass(frozen=True, slots=True)
class _Demand:
    """Groups of `tensor` ranks and engines of `workers` workers, all on GPUs."""

    groups: int
    tensor: int
    engines: int
    workers: int

    @property
    def processes(self) -> tuple[int, int]:
        return self.groups * self.tensor, self.engines * self.workers


def place(
    nodes: Iterable[Node],
    parallel: ParallelConfig | None,
    rollout: RolloutConfig,
    share_gpus: bool | None,
    parts: Callable[[], Iterable[ParallelConfig]] = tuple,
) -> Placement:
    """Place the ranks of `parallel` (None: no policy) and the engines of `rollout` on `nodes`.

    `parts` gives the smaller layouts that the model allows, the largest first: for the message. Raises PlacementError.
    """
    nodes = tuple(nodes)
    demand, sizes = _demand(parallel, rollout), [node.num_gpus for node in nodes]
    if not any(sizes):
        _check_ahead(parallel, rollout, is_shared=share_gpus is True)
        return _on_cores(nodes, demand)
    for is_shared in _ways(share_gpus):
        if counts := _fit(sizes, demand, is_shared):
            _check_ahead(parallel, rollout, is_shared=is_shared)
            return _seated(nodes, demand, counts, is_shared)
    raise PlacementError(_refusal(sizes, parallel, rollout, share_gpus, parts))


def _check_ahead(parallel: ParallelConfig | None, rollout: RolloutConfig, *, is_shared: bool) -> None:
    if parallel and rollout.max_staleness and is_shared:
        raise PlacementError(
            f"rollout.max_staleness: {rollout.max_staleness}, but engines that share GPUs with the policy sleep while "
            "it trains and can't draw ahead; set it to 0, or cluster.share_gpus=false and enough GPUs for both"
        )


def _demand(parallel: ParallelConfig | None, rollout: RolloutConfig) -> _Demand:
    groups, tensor = (parallel.world_size // parallel.tensor, parallel.tensor) if parallel else (0, 1)
    return _Demand(groups, tensor, rollout.num_engines, rollout.tensor)


def _ways(share_gpus: bool | None) -> tuple[bool, ...]:
    return (False, True) if share_gpus is None else (share_gpus,)


def _on_cores(nodes: Sequence[Node], demand: _Demand) -> Placement:
    turns = [Seat(node=nodes[turn % len(nodes)]) for turn in range(demand.groups + demand.engines)]
    ranks = [seat for seat in turns[: demand.groups] for _ in range(demand.tensor)]
    return Placement(nodes=tuple(nodes), ranks=tuple(ranks), engines=tuple(turns[demand.groups :]))


def _fit(sizes: Sequence[int], demand: _Demand, is_shared: bool) -> list[tuple[int, int]] | None:
    """Return how many tensor groups and engines each node gets; None where they don't fit."""
    return _shared(sizes, demand) if is_shared else _apart(sizes, demand)


def _apart(sizes: Sequence[int], demand: _Demand) -> list[tuple[int, int]] | None:
    groups, engines = demand.groups, demand.engines
    # most[k][e]: how many tensor groups the nodes from the k-th on have room for beside e engines; -1: not for those
    most = [[0] + [-1] * engines]
    for size in reversed(sizes):
        after = most[0]
        rooms = [(own, (size - own * demand.workers) // demand.tensor) for own in range(size // demand.workers + 1)]
        most.insert(
            0,
            [
                max((after[e - own] + room for own, room in rooms if own <= e and after[e - own] >= 0), default=-1)
                for e in range(engines + 1)
            ],
        )
    if most[0][engines] < groups:
        return None
    counts = []
    for size, after in zip(sizes, most[1:], strict=True):
        choices = [
            (min(groups, (size - own * demand.workers) // demand.tensor), own)
            for own in range(min(engines, size // demand.workers) + 1)
        ]
        count = max((own, beside) for own, beside in choices if after[engines - beside] >= groups - own)
        groups, engines = groups - count[0], engines - count[1]
        counts.append(count)
    return counts


def _shared(sizes: Sequence[int], demand: _Demand) -> list[tuple[int, int]] | None:
    ranks, workers = demand.processes
    more, fewer = (demand.groups, demand.tensor), (demand.engines, demand.workers)
    if workers > ranks:
        more, fewer = fewer, more
    many = _filled(sizes, *more)
    few = _filled([count * more[1] for count in many], *fewer)
    left = fewer[0] - sum(few)
    few = [a + b for a, b in zip(few, _filled(sizes, left, fewer[1], few), strict=True)]
    if sum(many) < more[0] or sum(few) < fewer[0]:
        return None
    return list(zip(few, many, strict=True) if workers > ranks else zip(many, few, strict=True))


def _filled(sizes: Sequence[int], number: int, size: int, before: Sequence[int] = ()) -> list[int]:
    """How many of `number` groups of a size each node takes, in order, beside those that it has before."""
    counts = []
    for index, room in enumerate(sizes):
        taken = before[index] if before else 0
        counts.append(min(number, room // size - taken))
        number -= counts[-1]
    return counts


def _seated(nodes: Sequence[Node], demand: _Demand, counts: Sequence[tuple[int, int]], is_shared: bool) -> Placement:
    ranks, engines = [], []
    for node, (own_groups, own_engines) in zip(nodes, counts, strict=True):
        num_ranks = own_groups * demand.tensor
        ranks += [Seat(node=node, gpus=(str(gpu),)) for gpu in range(num_ranks)]
        first = 0 if is_shared else num_ranks
        for engine in range(own_engines):
            begin = first + engine * demand.workers
            engines.append(Seat(node=node, gpus=tuple(map(str, range(begin, begin + demand.workers)))))
    return Placement(nodes=tuple(nodes), ranks=tuple(ranks), engines=tuple(engines))


def _refusal(
    sizes: Sequence[int],
    parallel: ParallelConfig | None,
    rollout: RolloutConfig,
    share_gpus: bool | None,
    parts: Callable[[], Iterable[ParallelConfig]],
) -> str:
    """What to say of a run that does not fit: the numbers, the rule that it breaks, what would fit."""
    demand = _demand(parallel, rollout)
    ranks, workers = demand.processes
    with_gpus = Counter(size for size in sizes if size)
    there = " and ".join(f"{counted(count, 'node')} of {size}" for size, count in sorted(with_gpus.items())[::-1])
    axes = f"{parallel.describe()} makes " if parallel and ranks > 1 else ""
    policy = f"{axes}{counted(ranks, 'rank')}, " if parallel else ""
    asked = f"{policy}{counted(rollout.num_engines, 'engine')} of {counted(rollout.tensor, 'worker')} take {workers}"
    needed = f"{ranks + workers} apart, " * (share_gpus is not True) + f"at least {max(ranks, workers)} shared"
    rules = [
        f"; {key}={size}: {who} stays inside a node, and none has more than {max(sizes)}"
        for key, size, who in (
            ("parallel.tensor", demand.tensor, "a tensor-parallel group"),
            ("rollout.tensor", demand.workers, "an engine"),
        )
        if size > max(sizes)
    ]
    smaller = "smaller parallel and rollout"  # where nobody said which parts of the ranks could be
    nearest = "; or ".join(_nearest(sizes, parallel, rollout, share_gpus, parts)) or f"more GPUs, or {smaller}"
    return (
        f"GPUs: {asked} (rollout.num_engines * rollout.tensor): {needed}, cluster.share_gpus={_yaml(share_gpus)}; "
        f"there are {sum(sizes)}, {there}{''.join(rules)}; what fits: {nearest}"
    )


def _nearest(
    sizes: Sequence[int],
    parallel: ParallelConfig | None,
    rollout: RolloutConfig,
    share_gpus: bool | None,
    parts: Callable[[], Iterable[ParallelConfig]],
) -> list[str]:
    """What of the run could be changed, and nothing else of it; where that does not do, its least."""

    def fits(parallel: ParallelConfig | None, rollout: RolloutConfig, share_gpus: bool | None) -> bool:
        return any(_fit(sizes, _demand(parallel, rollout), is_shared) for is_shared in _ways(share_gpus))

    smaller = list(parts()) if parallel else []
    fewer = [
        rollout.model_copy(update={"num_engines": number, "tensor": tensor})
        for tensor in range(rollout.tensor, 0, -1)
        if rollout.tensor % tensor == 0
        for number in range(rollout.num_engines, 0, -1)
    ]
    nearest = []
    if part := next((part for part in smaller if fits(part, rollout, share_gpus)), None):
        nearest.append(f"parallel {part.describe()} beside these engines")
    if pool := next((pool for pool in fewer if fits(parallel, pool, share_gpus)), None):
        nearest.append(f"{_engines(pool)} beside these ranks" if parallel else _engines(pool))
    if share_gpus is False and fits(parallel, rollout, True):
        nearest.append("cluster.share_gpus=true")
    for share in () if nearest else dict.fromkeys((share_gpus, True)):
        if part := next((part for part in smaller if fits(part, fewer[-1], share)), None):
            sharing = "" if share is share_gpus else " cluster.share_gpus=true"
            return [f"parallel {part.describe()} with {_engines(fewer[-1])}{sharing}"]
    return nearest


def _engines(rollout: RolloutConfig) -> str:
    return f"rollout.num_engines={rollout.num_engines} rollout.tensor={rollout.tensor}"


def _yaml(value: bool | None) -> str:
    return "null" if value is None else str(value).lower()


def counted(number: int, thing: str) -> str:
    """Return a number of things in words."""
    return f"{number} {thing}{'' if number == 1 else 's'}"
