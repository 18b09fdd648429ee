"""Which failed calls are a lost process: one that may do better when it is started again (a Ray of its own)."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from test_cluster import Worker, wait_until_gone

from astar_megatron.cluster.cluster import Cluster
from astar_megatron.cluster.errors import ActorLost, ClusterError
from astar_megatron.cluster.processes import process_tree
from astar_megatron.config import ClusterConfig

FOLDERS = os.pathsep.join(str(Path(__file__).parents[level]) for level in (0, 1, 2))
DRIVER = """
import os
if os.fork():
    os._exit(0)
from astar_megatron.cluster import cluster  # before Ray, as the commands do
import test_raylet
test_raylet.lose_processes()
print("all were told")
"""


def test_a_core_that_left_no_word_and_a_raylet_that_has_ended_are_lost_processes() -> None:
    """Of a driver whose parent is process 1, which Ray would take for the raylet."""
    driver = subprocess.run(
        [sys.executable, "-c", DRIVER], env=os.environ | {"PYTHONPATH": FOLDERS}, capture_output=True, text=True
    )
    assert driver.stdout.endswith("all were told\n"), driver.stdout + driver.stderr


def lose_processes() -> None:
    with Cluster(ClusterConfig()) as cluster:
        worker = cluster.actor("engine", 2, Worker, env={"PYTHONPATH": FOLDERS})
        with pytest.raises(ClusterError, match=r"engine 2: EngineCore ended with exit status 1$") as error:
            cluster.wait("engines: start", [worker.obey.remote("fail")], 60)
        assert not isinstance(error.value, ActorLost)
        with pytest.raises(ActorLost, match=r"engine 2: vLLM's core ended and left no word$"):
            cluster.wait("engines: start", [worker.obey.remote("fail without a word")], 60)
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
