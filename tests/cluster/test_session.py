"""The folder of a session: short, private, gone afterwards, whatever TMPDIR is; and what is left of killed runs."""

import errno
import io
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from samples import output_of

from astar_megatron.cluster import caretaker, session, session_stacks
from astar_megatron.cluster.errors import ClusterError
from astar_megatron.cluster.processes import kill, trackers, tree
from astar_megatron.cluster.session import SessionFolder

SHARED_MEMORY = Path("/dev/shm")


def test_the_folder_is_private_and_short_and_goes_with_the_run() -> None:
    with SessionFolder() as folder:
        status = folder.path.lstat()
        assert stat.S_IMODE(status.st_mode) == 0o700 and status.st_uid == os.getuid()
        longest = folder.path / "session_2026-11-28_00-24-26_240500_4194304" / "sockets" / "plasma_store"
        assert len(os.fsencode(longest)) <= 107
    assert not folder.path.exists()


def test_a_process_of_a_session_is_found_and_ended_where_tmpdir_is_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = Path("/tmp") / f"l{os.getpid()}"  # short, and may well lead to where no socket could lie
    link.symlink_to(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(link))
    try:
        with SessionFolder() as folder:
            assert folder.path.parent == link
            with (folder.path / "output").open("w") as output:
                worker = subprocess.Popen(["sleep", "600"], stdout=output)
            assert caretaker.writers(folder.path) == {worker.pid}
        assert worker.wait() == -signal.SIGKILL
    finally:
        link.unlink()


def test_after_an_error_the_logs_stay_and_nothing_else() -> None:
    with pytest.raises(ClusterError), SessionFolder() as folder:
        logs = folder.ray / "session_1" / "logs"
        logs.mkdir(parents=True)
        (logs / "worker.err").touch()
        (folder.ray / "session_1" / "sockets").mkdir()
        (folder.ray / "session_latest").symlink_to("session_1")
        (folder.ray / "ray_current_cluster").touch()
        raise ClusterError("an engine did not start")
    left = {path.relative_to(folder.path).as_posix() for path in folder.path.rglob("*")}
    of_ray = {"session_1", "session_1/logs", "session_1/logs/worker.err", "session_latest"}
    assert left == {"lock", "r", *(f"r/{name}" for name in of_ray)}
    age(folder.path, days=2)
    session.remove_left_behind()
    assert not folder.path.exists()


def test_after_an_error_without_logs_nothing_stays() -> None:
    with pytest.raises(ClusterError), SessionFolder() as folder:
        raise ClusterError("too few GPUs")
    assert not folder.path.exists()


def age(folder: Path, days: float) -> None:
    when = time.time() - days * 86400
    os.utime(folder / "lock", (when, when))


HOLDER = """
import multiprocessing, time
lock = multiprocessing.get_context("spawn").Lock()
print(lock._semlock.name[1:], flush=True)
time.sleep(60)
"""
KILLED = f"""
import os, subprocess, sys
from astar_megatron.cluster.processes import kill, trackers, tree
from astar_megatron.cluster.session import SessionFolder
with SessionFolder() as folder:
    holder = subprocess.Popen([sys.executable, "-c", {HOLDER!r}], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              start_new_session=True)
    name = holder.stdout.readline().decode().strip()
    folder.remember(os.getpid())
    (folder.ray / "session_1" / "logs").mkdir(parents=True)
    output = (folder.ray / "session_1" / "logs" / "worker-1.out").open("w")
    worker = subprocess.Popen(["sleep", "600"], stdout=output, start_new_session=True)
    print(holder.pid, folder.path, name, folder._caretaker.pid, worker.pid, flush=True)
    input()
"""


def test_what_a_killed_process_left_in_shared_memory_is_removed_and_a_living_run_keeps_its_own() -> None:
    with subprocess.Popen([sys.executable, "-c", KILLED], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        holder, path, name, caretaker, worker = process.stdout.readline().decode().split()
        folder, semaphore = Path(path), SHARED_MEMORY / f"sem.{name}"
        age(folder, days=0.5)
        session.remove_left_behind()
        assert semaphore.exists()
        for pid in (caretaker, process.pid, worker):
            os.kill(int(pid), signal.SIGKILL)
        process.wait()
        os.killpg(int(holder), signal.SIGKILL)  # with the process that would have removed it, as Ray does
        assert semaphore.exists()
        session.remove_left_behind()
        assert not semaphore.exists() and folder.exists()
        age(folder, days=2)
        session.remove_left_behind()
        assert not folder.exists()


def test_semaphores_bear_the_session_s_name_and_go_with_it_although_nobody_noted_them() -> None:
    named = f"from astar_megatron.cluster import session\nsession.name_semaphores()\n{HOLDER}"
    with SessionFolder() as folder:
        command, environment = [sys.executable, "-c", named], os.environ | folder.environment
        options: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "start_new_session": True}
        with subprocess.Popen(command, env=environment, **options) as holder:
            assert holder.stdout is not None
            semaphore = SHARED_MEMORY / f"sem.{holder.stdout.readline().decode().strip()}"
            os.killpg(holder.pid, signal.SIGKILL)  # its tracker too
        assert semaphore.exists()
    assert not semaphore.exists()


@pytest.mark.parametrize("way", ["by what they write", "by who started them"])
def test_a_tracker_gets_the_time_to_remove_what_a_killed_process_left(way: str, tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        command = [sys.executable, "-c", HOLDER]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log) as holder:
            assert holder.stdout is not None
            semaphore = SHARED_MEMORY / f"sem.{holder.stdout.readline().decode().strip()}"
            while not trackers(processes := tree(holder.pid)):  # it may not have its own name yet
                time.sleep(0.01)
            (tracker,) = trackers(processes)
            os.kill(tracker, signal.SIGSTOP)  # as on a machine that is busy
            threading.Timer(1.0, os.kill, (tracker, signal.SIGCONT)).start()
            if way == "by what they write":
                caretaker.end_writers(tmp_path)
            else:
                kill(processes)
                while Path(f"/proc/{tracker}/exe").exists():
                    time.sleep(0.05)
            assert holder.wait() == -signal.SIGKILL
    assert not semaphore.exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_killed_driver_had_started_ends_and_of_its_folder_the_logs_stay(number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", KILLED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdout is not None
        holder, path, name, caretaker, worker = process.stdout.readline().decode().split()
        folder = Path(path)
        if number != signal.SIGKILL:
            os.kill(int(caretaker), number)  # which whoever sends it to every process of a run sends to this one too
        os.killpg(process.pid, number)
        os.killpg(int(holder), signal.SIGKILL)  # it has nothing open in the folder
        assert process.stdout.read() == b""  # held until all is done
    assert not Path(f"/proc/{worker}/exe").exists()
    assert not (SHARED_MEMORY / f"sem.{name}").exists()
    left = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    assert left == {"lock", "r", "r/session_1", "r/session_1/logs", "r/session_1/logs/worker-1.out"}
    assert session.log_folder(process.pid) == folder / "r" / "session_1" / "logs"
    age(folder, days=2)
    session.remove_left_behind()


def test_what_a_killed_driver_had_started_ends_although_no_stacks_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(logs: Path, pids: set[int]) -> None:
        raise OSError(errno.ENOSPC, f"{logs}: no space for the stacks of {pids}")

    monkeypatch.setattr(session_stacks, "write", write)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))  # which the driver has closed
    logs = tmp_path / "r" / "session_1" / "logs"
    logs.mkdir(parents=True)
    (tmp_path / "lock").touch()
    (tmp_path / "socket").touch()
    with (logs / "worker-1.out").open("w") as output:
        worker = subprocess.Popen(["sleep", "600"], stdout=output)
    session.care(tmp_path)
    assert worker.wait() == -signal.SIGKILL
    assert not (tmp_path / "socket").exists() and (logs / "worker-1.out").exists()


@pytest.mark.parametrize("is_link", [False, True])  # as some Linux has it
def test_shared_memory_of_others_and_in_folders_is_not_the_run_s(
    is_link: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_link:
        (tmp_path / "shm").symlink_to(SHARED_MEMORY)
        monkeypatch.setattr(session, "SHARED_MEMORY", tmp_path / "shm")
    shared = SHARED_MEMORY / f"test-{os.getpid()}"
    shared.write_bytes(b"x" * 4096)
    program = "import mmap; f = open({!r}, 'r+b'); m = mmap.mmap(f.fileno(), 0); print(flush=True); input()"
    try:
        arguments = [sys.executable, "-c", program.format(str(shared))]
        with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            child.stdout.readline()
            assert shared.name in session.shared_files(os.getpid())
            assert session.shared_files(child.pid) == []  # what it has itself is for its parent to say
            child.kill()
    finally:
        shared.unlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_what_lies_in_another_user_s_folder_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a folder names a file to remove, and points at one to read; the lock in it may well be ours."""
    mine = SHARED_MEMORY / f"test-{os.getpid()}"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / "astar-12345678"
    (folder / "r" / "session_1" / "logs").mkdir(parents=True)
    folder.chmod(0o700)
    (folder / "lock").write_text(str(os.getpid()))
    (folder / "shared_files").write_text(mine.name)
    age(folder, days=2)
    assert session.log_folder(os.getpid()) == folder / "r" / "session_1" / "logs"
    mine.write_bytes(b"in use")
    try:
        os.chown(folder, 65534, -1)
        assert session.log_folder(os.getpid()) is None
        session.remove_left_behind()
        assert mine.exists() and folder.exists()
        os.chown(folder, os.getuid(), -1)
        session.remove_left_behind()
        assert not mine.exists() and not folder.exists()
    finally:
        mine.unlink(missing_ok=True)


FOLDER = "from astar_megatron.cluster import session; print(*session.folder_for_sessions(), sep='\\n')"


def folder(temporary: Path) -> list[str]:
    return output_of(FOLDER, TMPDIR=str(temporary)).splitlines()


def test_a_long_temporary_folder_is_left_for_a_usual_one_and_that_is_said(tmp_path: Path) -> None:
    long = tmp_path / ("d" * 100)
    long.mkdir()
    assert folder(long) == ["/tmp", f"{long} is too long for the names of Ray's sockets (26 bytes)"]
    assert folder(Path("/var/tmp")) == ["/var/tmp", "None"]


def test_a_folder_that_others_may_change_or_that_is_not_there_holds_no_session(tmp_path: Path) -> None:
    short = Path("/tmp") / f"a{os.getpid()}"
    short.mkdir(mode=0o700)
    try:
        assert session.problem(short) is None
        short.chmod(0o777)
        assert session.problem(short) == f"{short} is open to changes of other users"
        short.chmod(0o1777)
        assert session.problem(short) is None
    finally:
        short.rmdir()
    assert session.problem(short) == f"{short} is no folder that this user can write to"
