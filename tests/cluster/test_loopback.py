"""A session that is started here listens on loopback only, and ends with its driver (real Ray)."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sockets import LOOPBACK, listening, members

PROGRAM = """
import multiprocessing, signal, sys, time
import ray
from ray._private.worker import global_worker
from astar_megatron.cluster.cluster import Cluster
from astar_megatron.config import ClusterConfig
def stop(number, frame): raise SystemExit(7)
signal.signal(signal.SIGTERM, stop)
class Worker:
    def answer(self):
        with multiprocessing.Manager() as manager:  # as Megatron has one when it writes a checkpoint
            queue = manager.Queue()
            queue.put(42)
            return queue.get()
with Cluster(ClusterConfig()) as cluster:
    worker = cluster.actor("worker", 0, Worker, env={})
    print(cluster.wait("worker", [worker.answer.remote()], 120), flush=True)
    print(ray.get_runtime_context().gcs_address, global_worker.node.webui_url or "no dashboard", flush=True)
    time.sleep(600)
"""
JOIN = """
import sys
from astar_megatron.cluster.cluster import Cluster
from astar_megatron.config import ClusterConfig
with Cluster(ClusterConfig(address=sys.argv[1])) as cluster:
    print(cluster.num_nodes)
"""
TOKEN = "5ec2e7" * 10 + "abcd"


@pytest.mark.slow
def test_a_local_session_listens_on_loopback_only_and_sigterm_leaves_nothing_of_it(tmp_path: Path) -> None:
    """Without HOME: the token is in no file. With a TMPDIR in which no socket can be made: an actor has another."""
    temporary = tmp_path / ("d" * 100)
    temporary.mkdir()
    environment = os.environ | {"HOME": "/proc/nowhere", "TMPDIR": str(temporary)}
    command = [sys.executable, "-c", PROGRAM]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True, env=environment
    ) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "[42]\n"
        pids = members(driver.pid)
        addresses = listening(pids)
        assert sum(addresses.values()) >= 5 and set(addresses) <= LOOPBACK, addresses
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(timeout=60) == 7
    until = time.monotonic() + 20
    while (left := {pid for pid in pids if alive(pid)}) and time.monotonic() < until:
        time.sleep(0.1)
    assert not left
    assert not list(Path("/tmp").glob(f"astar-*/session_*_{driver.pid}"))


@pytest.mark.slow
def test_a_local_session_has_no_dashboard_shows_its_token_to_nobody_and_admits_nobody_without_it() -> None:
    def joining(address: str, **token: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", JOIN, address]
        return subprocess.run(command, env=environment | token, capture_output=True, text=True, timeout=300)

    environment = os.environ | {"HOME": "/proc/nowhere"}
    command = [sys.executable, "-c", PROGRAM]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True, env=environment | {"RAY_AUTH_TOKEN": TOKEN}
    ) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "[42]\n"
        address, _, dashboard = driver.stdout.readline().strip().partition(" ")
        assert dashboard == "no dashboard"
        for token in ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN[::-1]}):
            stranger = joining(address, **token)
            assert stranger.returncode and "it wants its token" in stranger.stderr, stranger
        assert joining(address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN).stdout == "1\n"
        (session,) = Path("/tmp").glob(f"astar-*/session_*_{driver.pid}")
        commands = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in members(driver.pid)]
        files = [path.read_bytes() for path in session.parent.rglob("*") if path.is_file()]
        assert len(commands) >= 4 and len(files) >= 4
        assert not any(TOKEN.encode() in data for data in (*commands, *files))
        driver.send_signal(signal.SIGTERM)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
