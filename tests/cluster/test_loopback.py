"""A session that is started here listens on loopback only, and ends with its driver, however that ends (real Ray)."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import samples
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
STRANGER = """
import sys
from ray._raylet import GcsClient
from ray.exceptions import AuthenticationError
try:
    print(b"session_name" in GcsClient(address=sys.argv[1]).internal_kv_keys(b"", None, 20))
except AuthenticationError:
    print("refused")
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
    until = time.monotonic() + 60
    while (left := {pid for pid in pids if alive(pid)}) and time.monotonic() < until:
        time.sleep(0.1)
    assert not left
    assert not list(Path("/tmp").glob(f"astar-*/r/session_*_{driver.pid}"))


@pytest.mark.slow
def test_a_local_session_has_no_dashboard_shows_its_token_to_nobody_and_admits_nobody_without_it() -> None:
    """Also where the user's environment says that Ray shall ask for none."""
    environment = os.environ | {"HOME": "/proc/nowhere", "RAY_AUTH_TOKEN": TOKEN, "RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, "-c", PROGRAM]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True, env=environment
    ) as driver:
        try:
            assert driver.stdout is not None
            assert driver.stdout.readline() == "[42]\n"
            address, _, dashboard = driver.stdout.readline().strip().partition(" ")
            assert dashboard == "no dashboard"
            with_token = {"RAY_AUTH_MODE": "token"}
            assert samples.output_of(STRANGER, address, RAY_AUTH_MODE="disabled") == "refused\n"
            assert samples.output_of(STRANGER, address, RAY_AUTH_TOKEN=TOKEN[::-1], **with_token) == "refused\n"
            assert samples.output_of(STRANGER, address, RAY_AUTH_TOKEN=TOKEN, **with_token) == "True\n"
            (session,) = Path("/tmp").glob(f"astar-*/r/session_*_{driver.pid}")
            commands = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in members(driver.pid)]
            files = [path.read_bytes() for path in session.parent.rglob("*") if path.is_file()]
            assert len(commands) >= 4 and len(files) >= 4
            assert not any(TOKEN.encode() in data for data in (*commands, *files))
        finally:
            driver.send_signal(signal.SIGTERM)


@pytest.mark.slow
def test_a_driver_that_is_killed_leaves_the_logs_of_its_session_and_the_stacks_and_nothing_else() -> None:
    """Here the worker and a process of its own do not hear that Ray has gone."""
    program = PROGRAM.replace("time.sleep(600)", "worker.hang.remote(); time.sleep(600)").replace(
        "class Worker:",
        """class Worker:
    def hang(self):
        import os, subprocess
        from astar_megatron.cluster.stacks import show_on_signal
        show_on_signal()
        subprocess.Popen(["sleep", "600"], start_new_session=True)
        time.sleep(600)
""",
    )
    with tempfile.TemporaryDirectory(prefix="e") as temporary:
        with subprocess.Popen(
            [sys.executable, "-c", program],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | {"TMPDIR": temporary, "PATH": samples.path_without("py-spy")},
        ) as driver:
            assert driver.stdout is not None
            assert driver.stdout.readline() == "[42]\n"
            driver.stdout.readline()
            while not (sleepers := {pid for pid in members(driver.pid) if command_of(pid) == "sleep 600 "}):
                time.sleep(0.05)
            pids = members(driver.pid)
            os.killpg(driver.pid, signal.SIGUSR1)  # to the driver alone, of which it is the end here
            assert driver.stdout.read() == ""  # the caretaker holds it until it is done
            assert driver.wait() == -signal.SIGUSR1
        until = time.monotonic() + 60
        while (left := {pid for pid in pids if alive(pid)}) and time.monotonic() < until:  # the caretaker itself
            time.sleep(0.1)
        assert sleepers <= pids and not left
        (folder,) = Path(temporary).iterdir()
        assert {path.name for path in folder.iterdir()} == {"lock", "r"}
        assert {path.name for path in (folder / "r").iterdir()} == {"session_latest", session_of(folder).name}
        assert {path.name for path in session_of(folder).iterdir()} == {"logs"}
        assert "by faulthandler" in (session_of(folder) / "logs" / "stacks.txt").read_text()
        (output,) = [path for path in session_of(folder).glob("logs/worker-*.err") if "in hang" in path.read_text()]
        assert output.name in (session_of(folder) / "logs" / "stacks.txt").read_text()


def session_of(folder: Path) -> Path:
    (path,) = folder.glob("r/session_[0-9]*")
    return path


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
