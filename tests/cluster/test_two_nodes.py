"""What a cluster of two nodes knows of each: real Ray in namespaces that share folders and nothing else."""

import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from two_nodes import ADDRESSES, Nodes, two_nodes

from astar_megatron.cluster.nodes import interface_of

PROGRAM = """
import sys, time
from pathlib import Path
from test_cluster import Worker, is_gone
from astar_megatron.cluster import folders, nodes
from astar_megatron.cluster.cluster import Cluster
from astar_megatron.cluster.errors import ClusterError
from astar_megatron.cluster.placement import place
from astar_megatron.config import ClusterConfig, ParallelConfig, RolloutConfig

def say(words):
    print("said", str(words).replace("\\n", "|"), flush=True)  # Ray writes lines of its own

def attempt(call, *arguments):
    try:
        say(call(*arguments))
    except ClusterError as error:
        say(error)

with Cluster(ClusterConfig(address=sys.argv[1])) as cluster:
    say([cluster.on_node(node, nodes.address) for node in cluster.nodes])
    say([cluster.on_node(node, nodes.interface_of, at.address) for node, at in cluster.nodes.items()])
    cluster.reserve(place(cluster.nodes.values(), ParallelConfig(), RolloutConfig(), None))
    far = cluster.actor("engine", 0, Worker, env={}, seat=cluster.reservation.placement.engines[0])
    (child,) = map(int, cluster.wait("work", [far.obey.remote("start")], 60))
    cluster.remember_processes([far])
    for order in sys.argv[3:]:
        attempt(lambda: cluster.wait("work", [far.obey.remote(order)], 30))
    say(cluster.beside(far, is_gone, child))  # the actor itself has ended
    cluster.end([far])
    while not cluster.beside(far, is_gone, child):
        time.sleep(0.1)
    shared, own = Path(sys.argv[2]), Path("/dev/shm")  # which each node has for itself
    (shared / "config.json").write_text("{}")
    (own / "config.json").write_text("{}")
    for folder in shared, own:
        attempt(folders.check_read, cluster, "model.path", str(folder))
        attempt(folders.check_written, cluster, "run_dir", str(folder))
"""


JOIN = """
import sys
from astar_megatron.cluster.cluster import Cluster
from astar_megatron.config import ClusterConfig
with Cluster(ClusterConfig(address=sys.argv[1])): pass
"""


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with two_nodes(Path(__file__).parent) as nodes:
        yield nodes


def test_nodes_are_asked_for_what_they_alone_know(nodes: Nodes, tmp_path: Path) -> None:
    status, out = nodes.run(sys.executable, "-c", PROGRAM, nodes.address, tmp_path, "point", "tell", seconds=300)
    assert status == 0, out
    lines = [line.removeprefix("said ") for line in out.splitlines() if line.startswith("said ")]
    addresses, interfaces, error, end, is_gone, *folders = lines
    assert (addresses, interfaces) == (str(list(ADDRESSES)), "['cable', 'cable']")
    assert f" on node {ADDRESSES[1]}|engine 0: OSError: no space left for the cache" in error
    assert f" on node {ADDRESSES[1]}|engine 0: was killed (SIGKILL), or ended itself at once; the last error " in end
    assert end.endswith(": RuntimeError: Unable to find address for: nope0")
    assert is_gone == "False"  # what it had started outlived it, until it was ended too
    assert folders[:2] == ["None", "None"]
    assert folders[2].startswith(f"model.path=/dev/shm: node {ADDRESSES[1]} sees no file in place of ")
    assert folders[3].startswith(f"run_dir=/dev/shm: node {ADDRESSES[1]} does not see this folder; ")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_preflight_knows_nodes_by_their_addresses_and_says_which_are_not_there(nodes: Nodes, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "astar_megatron.cli", "doctor", "--cluster", nodes.address]
    looked = shlex.join([*command, "--nodes", "2", "--json", "seen.json"])
    status, out = nodes.run("sh", "-c", f"cd {tmp_path} && {looked}", seconds=300)
    assert status == 0, out
    assert "2 of 2 nodes can be used\n" in out
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["nodes"] == sorted(seen["reports"]) == list(ADDRESSES)
    assert all(report["bandwidth"] > 0 and report["facts"]["reads"] for report in seen["reports"].values())
    assert [path.name for path in tmp_path.iterdir()] == ["seen.json"]
    status, out = nodes.run(*command, "--nodes", "3", "--seconds", "1", "--only-joined", seconds=300)
    assert status == 1, out
    assert "1 of 3 nodes are bad, (node 1 that has no name here), and 0 may be left out\n" in out


def test_nodes_that_ask_for_no_token_are_not_joined() -> None:
    with two_nodes(auth_mode="disabled") as nodes:
        status, out = nodes.run(sys.executable, "-c", JOIN, nodes.address, seconds=300)
    assert status == 1
    assert f"ClusterError: cluster.address: Ray on node {ADDRESSES[0]} asks no token of those who reach it; " in out


def test_an_address_that_no_interface_has_is_named() -> None:
    assert interface_of("127.0.0.1") == "lo"
    with pytest.raises(ValueError, match=r"^node 192\.0\.2\.1 .* has no interface with this address, only "):
        interface_of("192.0.2.1")
