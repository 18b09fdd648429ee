"""Actors that fail, hang or end are named at once (real Ray)."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from astar_megatron.cluster.cluster import Cluster, gpus_asked
from astar_megatron.cluster.errors import ClusterError
from astar_megatron.config import ClusterConfig


class Worker:
    """Does as it is told."""

    def obey(self, order: str) -> str:
        if order == "hang":
            time.sleep(600)
        if order == "end":
            os._exit(3)
        if order == "refuse":
            raise ValueError("data.path: no such file")
        if order == "break":
            raise KeyError("weights")
        return order


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(ClusterConfig()) as cluster:
        yield cluster


@pytest.fixture
def workers(cluster: Cluster) -> list[Any]:
    env = {"PYTHONPATH": str(Path(__file__).parent)}
    return [cluster.actor(f"worker {index}", Worker, env=env, num_gpus=0) for index in range(2)]


def test_results_come_in_the_order_of_the_calls(cluster: Cluster, workers: list[Any]) -> None:
    assert cluster.wait("work", [w.obey.remote(str(i)) for i, w in enumerate(workers)], 60) == ["0", "1"]


def test_a_failure_ends_the_wait_although_another_rank_hangs(cluster: Cluster, workers: list[Any]) -> None:
    calls = [workers[0].obey.remote("hang"), workers[1].obey.remote("break")]
    with pytest.raises(ClusterError, match=r"(?s)work: .*weights.*output of its processes lies in"):
        cluster.wait("work", calls, 60)


def test_a_wrong_input_that_only_the_actor_could_see_keeps_its_message(cluster: Cluster, workers: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"^data\.path: no such file$"):
        cluster.wait("work", [workers[0].obey.remote("refuse")], 60)


def test_an_ended_process_is_named(cluster: Cluster, workers: list[Any]) -> None:
    with pytest.raises(ClusterError, match="work: the process ended"):
        cluster.wait("work", [workers[0].obey.remote("end")], 60)


def test_a_hanging_actor_runs_into_its_deadline(cluster: Cluster, workers: list[Any]) -> None:
    with pytest.raises(ClusterError, match=r"work: no answer in 1 s; raise cluster\.start_timeout_seconds"):
        cluster.wait("work", [workers[0].obey.remote("hang")], 1)


def test_an_actor_asks_for_its_own_gpus_or_for_half_of_the_only_one() -> None:
    assert gpus_asked(8, 2, shared=False) == 2
    assert gpus_asked(1, 1, shared=True) == 0.5
    assert gpus_asked(0, 2, shared=False) == 0


JOIN = """
import sys
from astar_megatron.cluster.cluster import Cluster, gpus_asked
from astar_megatron.config import ClusterConfig
class Where:
    def answer(self): return 41 + 1
with Cluster(ClusterConfig(address=sys.argv[1])) as cluster:
    actor = cluster.actor("where", Where, env={}, num_gpus=0)
    print(cluster.num_nodes, cluster.wait("where", [actor.answer.remote()], 60))
    half = gpus_asked(cluster.num_gpus, 1, shared=True)
    both = [cluster.actor(name, Where, env={}, num_gpus=half) for name in ("rank", "engine")]
    print(cluster.num_gpus, cluster.wait("both", [one.answer.remote() for one in both], 60))
"""


def test_a_cluster_that_runs_already_is_joined() -> None:
    """With the token authentication that `ray start` turns on by itself; this run's end leaves it running.

    Its one GPU, of which Ray only knows the number, has room for a rank and an engine that share it.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray_command = str(Path(sys.executable).with_name("ray"))
    options = [f"--port={port}", "--include-dashboard=false", "--block", "--num-cpus=1", "--num-gpus=1"]
    with subprocess.Popen(
        [ray_command, "start", "--head", *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as head:
        try:
            assert head.stdout
            assert any("Ray runtime started" in line for line in head.stdout)
            for _ in range(2):
                done = subprocess.run(
                    [sys.executable, "-c", JOIN, f"127.0.0.1:{port}"], capture_output=True, text=True, timeout=120
                )
                assert done.stdout.splitlines() == ["1 [42]", "1 [42, 42]"], done.stderr
        finally:
            head.terminate()
            head.communicate(timeout=60)
