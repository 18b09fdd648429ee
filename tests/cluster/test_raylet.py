"""What is said where Ray's own process of a node has ended (a session of its own: it does not outlive this)."""

import contextlib
import os
import signal
from pathlib import Path

import pytest
import ray
from test_cluster import Worker, wait_until_gone

from astar_megatron.cluster.cluster import Cluster
from astar_megatron.cluster.errors import ActorLost, ClusterError
from astar_megatron.cluster.processes import process_tree
from astar_megatron.config import ClusterConfig


def test_an_error_of_an_actor_whose_raylet_has_ended_is_a_lost_process() -> None:
    env = {"PYTHONPATH": os.pathsep.join(str(Path(__file__).parents[level]) for level in (0, 2))}
    with Cluster(ClusterConfig()) as cluster:
        worker = cluster.actor("engine", 2, Worker, env=env)
        with pytest.raises(ClusterError, match="initialization failed") as error:
            cluster.wait("engines: start", [worker.obey.remote("fail")], 60)
        assert not isinstance(error.value, ActorLost)
        failed = worker.obey.remote("fail")
        ray.wait([failed], timeout=60)
        (raylet,) = (pid for pid in process_tree(os.getpid()) if name_of(pid) == "raylet")
        os.kill(raylet, signal.SIGKILL)
        wait_until_gone(raylet)
        with pytest.raises(ActorLost, match=r"engine 2: Ray's own process of its node, the raylet, has ended$"):
            cluster.wait("engines: start", [failed], 60)


def name_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/exe").readlink().name
    return ""
