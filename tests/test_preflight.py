"""What preflight says of nodes: each kind of bad one is named, and left out only where it can be."""

import os
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from sockets import LOOPBACK, listening

from astar_megatron.cluster import nodes
from astar_megatron.cluster.links import LinkEnd, pairings
from astar_megatron.cluster.placement import Node
from astar_megatron.cluster.survey import Clock
from astar_megatron.preflight import wanted_nodes
from astar_megatron.run.node_facts import NodeFacts
from astar_megatron.run.node_faults import Fault, Report, judge, verdict
from astar_megatron.run.resources import GIB

NAMES = ["a", "b", "c", "d"]
FACTS = NodeFacts(
    versions={"ray": "2.60.0", "torch": "2.13.0"},
    gpus=("H100", "H100"),
    driver="570.1",
    cores=16.0,
    disk_bytes=100 * GIB,
    shared_memory_bytes=100 * GIB,
    reads=True,
    wrote="0f",
)
GOOD = Report(
    joined=Node(address="10.0.0.1", num_gpus=2),
    facts=FACTS,
    clock=Clock(seconds=0.0, error_seconds=0.01),
    bandwidth=10e9,
    written=True,
)


def faults_where_c_is(**changes: Any) -> list[Fault]:
    """The faults of four nodes, of which c differs."""
    reports = dict.fromkeys(NAMES, GOOD)
    return judge(NAMES, reports | {"c": replace(GOOD, **changes)})


def with_facts(**changes: Any) -> dict[str, Any]:
    return {"facts": replace(FACTS, **changes)}


BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "fewer GPUs for Ray": ({"joined": Node(address="10.0.0.3", num_gpus=1)}, "GPUs that Ray has", "1, others 2"),
    "fewer GPUs": (with_facts(gpus=("H100",)), "GPUs", "1 H100, others 2 H100"),
    "other GPUs": (with_facts(gpus=("H100", "A100")), "GPUs", "1 H100, 1 A100, others 2 H100"),
    "another driver": (with_facts(driver="550.2"), "GPU driver", "550.2, others 570.1"),
    "another version": (
        with_facts(versions={"ray": "2.60.0", "torch": "2.12.0"}),
        "torch",
        "2.12.0, others 2.13.0",
    ),
    "a package missing": (with_facts(versions={"torch": "2.13.0"}), "ray", "none, others 2.60.0"),
    "blind": (with_facts(reads=False), "shared folder", "does not see what another node writes"),
    "unseen": ({"written": False}, "shared folder", "what it writes is not seen by others"),
    "fewer cores than GPUs": (
        with_facts(cores=1.0),
        "cores",
        "1 for 2 GPUs; ask for more: sbatch --exclusive, or --cpus-per-task=2 or more",
    ),
    "little disk": (with_facts(disk_bytes=GIB), "disk", "1.0 GiB free, 5.0 GiB wanted"),
    "little shared memory": (with_facts(shared_memory_bytes=0), "/dev/shm", "0.0 GiB free, 1.0 GiB wanted"),
    "ahead": (
        {"clock": Clock(seconds=7.0, error_seconds=0.5)},
        "clock",
        "7.0 s ahead of the others; set it (ntp, chrony)",
    ),
    "behind": (
        {"clock": Clock(seconds=-3.0, error_seconds=0.5)},
        "clock",
        "3.0 s behind the others; set it (ntp, chrony)",
    ),
    "slow": ({"bandwidth": 4e9}, "link", "4.00 GB/s, the median is 10.00 GB/s"),
    "cut off": ({"bandwidth": "timed out"}, "link", "no all-reduce with any other node: timed out"),
    "silent": ({"facts": "no answer in 120 s", "clock": "", "bandwidth": None}, "answer", "no answer in 120 s"),
}


@pytest.mark.parametrize("kind", BAD)
def test_each_kind_of_bad_node_is_named(kind: str) -> None:
    changes, check, state = BAD[kind]
    assert faults_where_c_is(**changes) == [Fault(node="c", check=check, state=state)]


def test_equal_nodes_have_no_faults() -> None:
    assert faults_where_c_is() == []
    alone = replace(GOOD, bandwidth=None)
    assert judge(["a"], {"a": alone}) == []


def test_nodes_without_spares_may_differ_in_how_many_gpus_they_have() -> None:
    fewer = replace(GOOD, joined=Node(address="10.0.0.3", num_gpus=1), **with_facts(gpus=("H100",)))
    none = replace(GOOD, joined=Node(address="10.0.0.4", num_gpus=0), **with_facts(gpus=(), driver=""))
    reports = {"a": GOOD, "b": fewer, "c": none}
    assert judge(["a", "b", "c"], reports, are_alike=False) == []
    other = replace(GOOD, **with_facts(gpus=("H100", "A100"), driver="550.2"))
    faults = judge(["a", "b", "c", "d"], reports | {"d": other}, are_alike=False)
    assert [(fault.node, fault.state) for fault in faults] == [
        ("d", "H100, A100, others H100"),
        ("d", "550.2, others 570.1"),
    ]


def test_a_node_that_has_not_joined_is_named() -> None:
    reports = dict.fromkeys(["a", "b", "d"], GOOD)
    assert judge(NAMES, reports) == [Fault(node="c", check="joined", state="has not joined Ray in time")]


def test_a_clock_that_may_be_right_is_no_fault() -> None:
    assert faults_where_c_is(clock=Clock(seconds=7.0, error_seconds=6.0)) == []


def test_of_two_unlike_nodes_the_second_is_named() -> None:
    other = replace(GOOD, clock=Clock(seconds=-9.0, error_seconds=0.1), **with_facts(driver="550.2"))
    assert [fault.node for fault in judge(["a", "b"], {"a": GOOD, "b": other})] == ["b", "b"]


def test_bad_nodes_are_left_out_up_to_the_spare_ones_and_never_the_drivers() -> None:
    bad = [Fault(node=name, check="disk", state="full") for name in ("c", "b", "c")]
    assert verdict(bad, NAMES, "a", 2).left_out == ("b", "c")
    assert verdict(bad, NAMES, "a", 2).refusal == ""
    assert verdict(bad, NAMES, "a", 1).left_out == ()
    assert verdict(bad, NAMES, "a", 1).refusal == "2 of 4 nodes are bad, b, c, and 1 may be left out"
    assert verdict(bad, NAMES, "b", 4).refusal == "b has Ray's head and the program, and can't be left out"
    assert verdict([], NAMES, "a", 0).refusal == ""


@pytest.mark.parametrize("num_nodes", range(2, 12))
def test_nodes_meet_in_pairs_never_the_same_twice(num_nodes: int) -> None:
    rounds = pairings(num_nodes)
    for pairs in rounds:
        assert max(Counter(node for pair in pairs for node in pair).values()) == 1
    met = Counter(frozenset(pair) for pairs in rounds for pair in pairs)
    assert max(met.values()) == 1
    assert {node for pair in met for node in pair} == set(range(num_nodes))


def test_names_of_nodes_come_with_commas_or_as_a_number() -> None:
    assert wanted_nodes("a, b") == ["a", "b"]
    assert wanted_nodes("12") == 12
    for wrong in ("", "a,", "a,a"):
        with pytest.raises(ValueError, match="--nodes: expected names with commas, each once, or a number, got "):
            wanted_nodes(wrong)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_one_end_of_a_link_listens_on_its_nodes_own_address_only(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "address", lambda: address)
    before = Counter(listening({os.getpid()}))
    end = LinkEnd("gloo")
    assert end.listen().startswith(f"{address}:")
    opened = Counter(listening({os.getpid()})) - before
    assert opened.total() == 1 and set(opened) <= LOOPBACK
