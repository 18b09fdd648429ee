"""A session that is started here listens on loopback only, and ends with its driver (real Ray)."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = """
import multiprocessing, signal, sys, time
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
    time.sleep(600)
"""
LISTENS = "0A"  # a state in /proc/net/tcp
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def members(session: int) -> set[int]:
    """The processes of a session of the kernel's, with all that they started, also in sessions of their own."""
    parents, pids = {}, set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(folder.name)] = int(fields[1])
        if int(fields[3]) == session:
            pids.add(int(folder.name))
    while more := {pid for pid, parent in parents.items() if parent in pids} - pids:
        pids |= more
    return pids


def listening(pids: set[int]) -> dict[str, int]:
    """The local addresses (hexadecimal, without the port) on which these processes listen, and how often."""
    inodes = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                inodes.add(str(descriptor.readlink()))
            except OSError:
                continue
    counts: dict[str, int] = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENS and f"socket:[{fields[9]}]" in inodes:
                address = fields[1].partition(":")[0]
                counts[address] = counts.get(address, 0) + 1
    return counts


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


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
