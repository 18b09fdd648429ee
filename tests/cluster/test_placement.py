"""Who gets which GPUs: tables of cases, what holds for every placement, and what is said of runs that don't fit."""

import re
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from astar_megatron.cluster.placement import Node, Placement, PlacementError, Seat, place
from astar_megatron.config import ParallelConfig, RolloutConfig

PARTS = [ParallelConfig(tensor=t, data=d) for t, d in ((2, 4), (2, 2), (1, 4), (2, 1), (1, 2), (1, 1))]


def nodes(*sizes: int) -> list[Node]:
    return [Node(address=f"10.0.0.{index}", num_gpus=size) for index, size in enumerate(sizes)]


def placed(
    sizes: tuple[int, ...], axes: dict[str, Any], engines: tuple[int, int], share_gpus: bool | None = False
) -> Placement:
    """The placement of a layout, and of a number of engines of so many workers."""
    rollout = RolloutConfig(num_engines=engines[0], tensor=engines[1])
    return place(nodes(*sizes), ParallelConfig(**axes), rollout, share_gpus, lambda: PARTS)


def short(seats: tuple[Seat, ...]) -> list[str]:
    """Node and GPUs of each seat, as 1:23 for the GPUs 2 and 3 of the second node."""
    return [f"{seat.node.address.rpartition('.')[2]}:{''.join(seat.gpus)}" for seat in seats]


APART = {
    "two of two": ((2,), {}, (1, 1), "0:0", "0:1"),
    "engines behind ranks": ((8,), {"tensor": 2, "data": 2}, (2, 2), "0:0 0:1 0:2 0:3", "0:45 0:67"),
    "a node a side": ((4, 4), {"tensor": 4}, (2, 2), "0:0 0:1 0:2 0:3", "1:01 1:23"),
    "pipeline stages over nodes": ((2, 3), {"tensor": 2, "pipeline": 2}, (1, 1), "0:0 0:1 1:0 1:1", "1:2"),
    "a group skips a node that is too small": ((1, 4), {"tensor": 2}, (1, 1), "1:0 1:1", "0:0"),
    "ranks leave room for the engine": ((4, 2), {"data": 2}, (1, 4), "1:0 1:1", "0:0123"),
    "a node without GPUs among others": ((0, 2), {}, (1, 1), "1:0", "1:1"),
    "some are idle": ((8, 8), {}, (1, 1), "0:0", "0:1"),
}


@pytest.mark.parametrize(("sizes", "axes", "engines", "ranks", "workers"), APART.values(), ids=APART)
def test_apart_ranks_come_first_and_engines_after_them(
    sizes: tuple[int, ...], axes: dict[str, Any], engines: tuple[int, int], ranks: str, workers: str
) -> None:
    placement = placed(sizes, axes, engines)
    assert (short(placement.ranks), short(placement.engines)) == (ranks.split(), workers.split())
    assert not placement.shared
    assert placed(sizes, axes, engines, None) == placement  # nobody shares without need


SHARED = {
    "the only one": ((1,), {}, (1, 1), "0:0", "0:0", 1),
    "as many of both": ((4,), {"data": 4}, (2, 2), "0:0 0:1 0:2 0:3", "0:01 0:23", 4),
    "more ranks": ((4,), {"data": 4}, (2, 1), "0:0 0:1 0:2 0:3", "0:0 0:1", 2),
    "more workers": ((4,), {"tensor": 2}, (4, 1), "0:0 0:1", "0:0 0:1 0:2 0:3", 2),
    "over nodes": ((2, 2), {"tensor": 2, "data": 2}, (2, 2), "0:0 0:1 1:0 1:1", "0:01 1:01", 4),
    "beside ranks before alone": ((3, 2), {"tensor": 2, "data": 2}, (3, 1), "0:0 0:1 1:0 1:1", "0:0 0:1 1:0", 3),
    "where the larger side is": ((3, 4), {"tensor": 3}, (1, 4), "1:0 1:1 1:2", "1:0123", 3),
    "one worker alone": ((3, 2), {"tensor": 2, "data": 2}, (1, 3), "0:0 0:1 1:0 1:1", "0:012", 2),
}


@pytest.mark.parametrize(("sizes", "axes", "engines", "ranks", "workers", "count"), SHARED.values(), ids=SHARED)
def test_who_shares_is_beside_the_other_as_far_as_that_goes(
    sizes: tuple[int, ...], axes: dict[str, Any], engines: tuple[int, int], ranks: str, workers: str, count: int
) -> None:
    placement = placed(sizes, axes, engines, True)
    assert (short(placement.ranks), short(placement.engines)) == (ranks.split(), workers.split())
    assert len(placement.shared) == count
    assert sum(placement.ranks_shared()) == count


def test_null_shares_where_there_are_too_few_for_both() -> None:
    assert not placed((8,), {"data": 4}, (2, 2), None).shared
    assert len(placed((7,), {"data": 4}, (2, 2), None).shared) == 4


def test_without_gpus_groups_and_engines_go_to_the_nodes_by_turns() -> None:
    placement = placed((0, 0), {"tensor": 2, "data": 2}, (3, 2))
    assert short(placement.ranks) == ["0:", "0:", "1:", "1:"]
    assert short(placement.engines) == ["0:", "1:", "0:"]
    assert placement == placed((0, 0), {"tensor": 2, "data": 2}, (3, 2), True)
    small = placed((0, 0), {"tensor": 2}, (1, 1))
    assert short(small.ranks) == ["0:", "0:"] and short(small.engines) == ["1:"]


def test_engines_alone_are_packed() -> None:
    placement = place(nodes(3, 8), None, RolloutConfig(num_engines=4, tensor=2), None)
    assert short(placement.engines) == ["0:01", "1:01", "1:23", "1:45"] and not placement.ranks


def test_64_nodes_of_8_are_filled_to_the_last_gpu() -> None:
    placement = placed((8,) * 64, {"tensor": 8, "pipeline": 8, "data": 4}, (128, 2))
    assert Counter(seat.node.address for seat in placement.ranks) == {f"10.0.0.{node}": 8 for node in range(32)}
    assert Counter(seat.node.address for seat in placement.engines) == {f"10.0.0.{node}": 4 for node in range(32, 64)}
    assert placement.describe() == "256 policy ranks and 128 engines on 512 of 512 GPUs, 64 nodes; none shared"


# --- what holds for every placement

SIZES = st.integers(1, 4)


@given(
    sizes=st.lists(st.integers(0, 8), min_size=1, max_size=5),
    axes=st.fixed_dictionaries({"tensor": SIZES, "pipeline": st.integers(1, 2), "data": st.integers(1, 3)}),
    engines=st.tuples(SIZES, SIZES),
    share_gpus=st.sampled_from([True, False, None]),
)
def test_each_gpu_has_at_most_a_rank_and_a_worker_and_groups_stay_on_a_node(
    sizes: list[int], axes: dict[str, int], engines: tuple[int, int], share_gpus: bool | None
) -> None:
    try:
        placement = placed(tuple(sizes), axes, engines, share_gpus)
    except PlacementError:
        return
    assert len(placement.ranks) == ParallelConfig(**axes).world_size  # type: ignore[arg-type]
    assert len(placement.engines) == engines[0]
    for group in range(0, len(placement.ranks), axes["tensor"]):
        assert len({seat.node for seat in placement.ranks[group : group + axes["tensor"]]}) == 1
    sides = []
    for seats in (placement.ranks, placement.engines):
        gpus = [(seat.node, gpu) for seat in seats for gpu in seat.gpus]
        assert len(gpus) == len(set(gpus))
        assert all(0 <= int(gpu) < node.num_gpus for node, gpu in gpus)
        sides.append(set(gpus))
    if any(sizes):
        assert all(len(seat.gpus) == 1 for seat in placement.ranks)
        assert all(len(seat.gpus) == engines[1] for seat in placement.engines)
    if share_gpus is False:
        assert not sides[0] & sides[1]
    assert placement.shared == sides[0] & sides[1]
    for gpus in placement.gpus().values():  # from the first on, without gaps: reservation.py asks for so many
        assert gpus == [str(gpu) for gpu in range(len(gpus))]


@given(
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    groups=st.tuples(st.integers(0, 4), SIZES),
    engines=st.tuples(SIZES, SIZES),
)
def test_what_fits_apart_is_never_refused(sizes: list[int], groups: tuple[int, int], engines: tuple[int, int]) -> None:
    """Against every way to deal the engines to the nodes."""
    ways = {0: 0}  # engines dealt: the most tensor groups beside them
    for size in sizes:
        ways = {
            total: max(
                ways[total - own] + (size - own * engines[1]) // groups[1]
                for own in range(size // engines[1] + 1)
                if total - own in ways
            )
            for total in range(max(ways) + size // engines[1] + 1)
        }
    fits = any(sizes) and ways.get(engines[0], -1) >= groups[0]
    parallel = ParallelConfig(tensor=groups[1], data=groups[0]) if groups[0] else None
    if not any(sizes):
        return
    rollout = RolloutConfig(num_engines=engines[0], tensor=engines[1])
    if fits:
        place(nodes(*sizes), parallel, rollout, False)
    else:
        with pytest.raises(PlacementError):
            place(nodes(*sizes), parallel, rollout, False)


# --- what is refused

REFUSED = {
    "too few": (
        ((4,), {"tensor": 2, "data": 4}, (2, 2), False),
        "tensor=2 data=4 makes 8 ranks, 2 engines of 2 workers take 4 (rollout.num_engines * rollout.tensor): 12 "
        "apart, at least 8 shared, cluster.share_gpus=false; there are 4, 1 node of 4; what fits: parallel tensor=2 "
        "with rollout.num_engines=1 rollout.tensor=1",
    ),
    "fewer ranks or engines": (
        ((8,), {"data": 4}, (3, 2), False),
        "there are 8, 1 node of 8; what fits: parallel tensor=2 beside these engines; or rollout.num_engines=2 "
        "rollout.tensor=2 beside these ranks; or cluster.share_gpus=true",
    ),
    "a group larger than a node": (
        ((4, 4, 2), {"tensor": 8}, (1, 1), None),
        "there are 10, 2 nodes of 4 and 1 node of 2; parallel.tensor=8: a tensor-parallel group stays inside a node, "
        "and none has more than 4; what fits: parallel tensor=2 data=4 beside these engines",
    ),
    "an engine larger than a node": (
        ((2, 2), {}, (1, 4), None),
        "rollout.tensor=4: an engine stays inside a node, and none has more than 2; what fits: rollout.num_engines=1 "
        "rollout.tensor=2 beside these ranks",
    ),
    "too few shared": (
        ((2,), {"data": 4}, (1, 1), True),
        "data=4 makes 4 ranks, 1 engine of 1 worker take 1 (rollout.num_engines * rollout.tensor): at least 4 shared, "
        "cluster.share_gpus=true; there are 2, 1 node of 2; what fits: parallel tensor=2 beside these engines",
    ),
    "both for one GPU": (
        ((1,), {"data": 2}, (2, 1), False),
        "what fits: parallel one rank with rollout.num_engines=1 rollout.tensor=1 cluster.share_gpus=true",
    ),
    "both too large": (
        ((2,), {"data": 4}, (1, 3), None),
        "what fits: parallel tensor=2 with rollout.num_engines=1 rollout.tensor=1",
    ),
}


@pytest.mark.parametrize(("arguments", "words"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_once_with_the_numbers_and_the_nearest_that_do(arguments: Any, words: str) -> None:
    with pytest.raises(PlacementError, match=re.escape(words)):
        placed(*arguments)


@pytest.mark.parametrize(("sizes", "share"), [((4,), True), ((3,), None), ((0, 0), True)])
def test_engines_that_share_gpus_draw_nothing_ahead(sizes: tuple[int, ...], share: bool | None) -> None:
    for ahead, parallel in ((0, ParallelConfig(data=2)), (2, None)):
        assert place(nodes(*sizes), parallel, RolloutConfig(num_engines=2, max_staleness=ahead), share).engines
    with pytest.raises(
        PlacementError, match=r"rollout\.max_staleness: 2, but engines .* sleep .*; set it to 0, or clu"
    ):
        place(nodes(*sizes), ParallelConfig(data=2), RolloutConfig(num_engines=2, max_staleness=2), share)


def test_what_is_proposed_fits() -> None:
    with pytest.raises(PlacementError, match=r"rollout\.num_engines=2 rollout\.tensor=2 beside these ranks"):
        placed((8,), {"data": 4}, (3, 2))
    assert not placed((8,), {"data": 4}, (2, 2)).shared
    assert not placed((8,), {"tensor": 2}, (3, 2)).shared
    assert len(placed((8,), {"data": 4}, (3, 2), True).shared) == 4


# --- what is said of a placement


def test_the_table_names_each_gpu_who_is_there_and_what_is_idle() -> None:
    placement = placed((2, 2), {"data": 1}, (1, 2), True)
    assert placement.rows() == [
        ("10.0.0.0 GPU 0", "rank 0, engine 0"),
        ("10.0.0.0 GPU 1", "engine 0"),
        ("10.0.0.1", "2 GPUs idle"),
    ]
    assert placement.describe() == "1 policy rank and 1 engine on 2 of 4 GPUs, 1 node; 1 shared"
    assert placement.fields() == {
        "nodes": [{"address": "10.0.0.0", "num_gpus": 2}, {"address": "10.0.0.1", "num_gpus": 2}],
        "ranks": [{"node": "10.0.0.0", "gpus": ["0"]}],
        "engines": [{"node": "10.0.0.0", "gpus": ["0", "1"]}],
    }
    cores = placed((0,), {"data": 2}, (1, 1))
    assert cores.rows() == [("10.0.0.0", "rank 0, rank 1, engine 0")]
    assert cores.describe() == "2 policy ranks and 1 engine on the cores of 1 node"


def test_gpus_take_the_names_that_ray_has_for_them() -> None:
    node = Node(address="10.0.0.1", num_gpus=3, id="a")
    named = place([node], ParallelConfig(), RolloutConfig(tensor=2), False).numbered({"a": ["4", "6", "10"]})
    assert [seat.gpus for seat in (*named.ranks, *named.engines)] == [("4",), ("6", "10")]
    assert named.gpus()[node] == ["4", "6", "10"]
