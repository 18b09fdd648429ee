"""The folder of one run's Ray session: sockets and logs in a short place of its own, whatever TMPDIR and HOME are.

Linux limits the name of a unix socket to 107 bytes, and Ray's own part of it takes 64. The folder also lists what the
run's processes have in /dev/shm (vLLM's semaphores and buffers): a killed process leaves it there.

However the driver ends, its processes end, and nothing of them stays but logs: by `__exit__`, else by `care` in a
process of its own (caretaker.py), else, if that was killed too, by the next run on this machine.
"""

import contextlib
import logging
import multiprocessing
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from astar_megatron.cluster import caretaker, session_stacks
from astar_megatron.cluster.errors import NoFolderError
from astar_megatron.cluster.processes import process_tree
from astar_megatron.data.files import exclusive, write_atomic

_LOG = logging.getLogger(__name__)
PREFIX = "astar-"
LOCK = "lock"  # held while the run lives: numbers of processes mean nothing to a container; it holds the driver's
_SHARED_FILES = "shared_files"  # a name a line
SHARED_MEMORY = Path("/dev/shm")
OBJECT_STORE_BYTES = 256 << 20  # Ray's, there: prompts and rollouts are small; weights do not pass through it
_RAY = "r"
_LONGEST_FOLDER = 107 - 64 - len(f"/{PREFIX}12345678/{_RAY}")  # bytes of a folder in which the session's folder can lie
_LOGS_SECONDS = 24 * 3600.0  # how long the logs of a run that failed are kept
_START_SECONDS = 10.0  # within which a run that has made its folder, or the lock in it, also holds the lock


class SessionFolder:
    """A folder that only this user can enter. A context manager: it goes with the run; after an error its logs stay."""

    def __init__(self) -> None:
        remove_left_behind()
        folder, reason = folder_for_sessions()
        if reason:
            _LOG.warning("TMPDIR: %s; the sockets and logs of this run's processes lie in %s", reason, folder)
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=folder))  # made anew, 0700; no link is followed
        self.ray = self.path / _RAY  # Ray opens it to everyone, and nobody else gets as far
        self.ray.mkdir()
        # Of the run's processes: Megatron's checkpoints make folders and sockets there, and a killed one leaves them.
        self.environment = {"TMPDIR": str(self.path)}
        self._lock = exclusive(self.path / LOCK, "this run")
        self._shared: set[str] = set()

    def __enter__(self) -> Self:
        self._lock.__enter__()
        (self.path / LOCK).write_text(str(os.getpid()), encoding="utf-8")
        self._caretaker = caretaker.start(self.path)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        _end_processes(self.path)
        if kind is not None and issubclass(kind, Exception):
            _remove_all_but_logs(self.path)
        else:
            shutil.rmtree(self.path, ignore_errors=True)
        self._lock.__exit__(None, None, None)
        self._caretaker.kill()
        self._caretaker.communicate()

    def remember(self, pid: int) -> None:
        """Note what process `pid` and its descendants now have in /dev/shm, to be removed after the run if still there.

        For processes whose shared memory is theirs alone.
        """
        self._shared |= set(shared_files(pid))
        write_atomic(self.path / _SHARED_FILES, "".join(f"{name}\n" for name in sorted(self._shared)).encode())


def name_semaphores() -> None:
    """In a process with a session's environment: what it and its children make in /dev/shm bears the session's name.

    So it is known although all of them were killed as they began, with the tracker that would have removed it. By
    multiprocessing's own prefix, which children take over.
    """
    folder = Path(tempfile.gettempdir())
    if folder.name.startswith(PREFIX):
        multiprocessing.current_process()._config["semprefix"] = f"/{folder.name}"  # pyright: ignore


def care(folder: Path) -> None:
    """In the caretaker: wait for the driver's end, and leave of its session what an error leaves, the logs."""
    sys.stdin.buffer.read()  # the driver holds it open
    if folder.exists():
        write_stacks(folder)
        _end_processes(folder)
        _remove_all_but_logs(folder)
    remove_shared_folders()


def write_stacks(folder: Path) -> None:
    """Write the stacks of a session's processes among its logs, if the disk takes them: a run may have ended of it."""
    with contextlib.suppress(OSError):
        for logs in (folder / _RAY).glob("session_[0-9]*/logs"):
            session_stacks.write(logs, caretaker.writers(folder))


def log_folder(driver: int) -> Path | None:
    """Return where the logs of the newest session of a driver lie, by its process number; None where none is left."""
    folders = [folder for folder in _session_folders() if _driver_of(folder) == driver]
    logs = [path for folder in folders for path in (folder / _RAY).glob("session_[0-9]*/logs")]
    return max(logs, key=lambda path: path.stat().st_mtime, default=None)


def shared_files(pid: int) -> list[str]:
    """Return the names of files of /dev/shm, not of folders in it, that the descendants of a process have mapped."""
    return shared_files_of(process_tree(pid) - {pid})


def shared_files_of(pids: set[int]) -> list[str]:
    """Return the names of files of /dev/shm, not of folders in it, that processes have mapped."""
    inodes = set()  # a semaphore's file is mapped under a temporary name, and then linked to its own
    place = f" {SHARED_MEMORY.resolve()}/"  # as the kernel names it
    for member in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{member}/maps").read_text(errors="replace").splitlines():
                if place in line:
                    inodes.add(int(line.split(maxsplit=5)[4]))  # address, rights, offset, device, inode, name
    return sorted(entry.name for entry in os.scandir(SHARED_MEMORY) if entry.inode() in inodes)


def folder_for_sessions() -> tuple[Path, str | None]:
    """Return the folder for sessions, TMPDIR where it can hold one; else a usual one, and why.

    Raises NoFolderError where there is none.
    """
    first = Path(tempfile.gettempdir())
    reasons = []
    for folder in candidates(first):
        reason = problem(folder)
        if reason is None:
            return folder, reasons[0] if reasons else None
        reasons.append(reason)
    raise NoFolderError(
        f"TMPDIR: no folder for the sockets of this run's processes: {'; '.join(reasons)}; "
        "set TMPDIR to a short folder that you can write to"
    )


def candidates(first: Path) -> list[Path]:
    """Return the folders that are tried, in order."""
    return list(dict.fromkeys([first, Path("/tmp"), Path("/var/tmp"), Path(f"/run/user/{os.getuid()}")]))


def problem(folder: Path) -> str | None:
    """Return why `folder` can't hold a session; None if it can."""
    if len(os.fsencode(folder)) > _LONGEST_FOLDER:
        return f"{folder} is too long for the names of Ray's sockets ({_LONGEST_FOLDER} bytes)"
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        return f"{folder} is no folder that this user can write to"
    status = folder.stat()
    others_write = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not status.st_mode & stat.S_ISVTX
    if others_write or status.st_uid not in (os.getuid(), 0):
        return f"{folder} is open to changes of other users"
    return None


def remove_left_behind() -> None:
    """Remove what runs that were killed left: what is in /dev/shm at once, folders with their logs after a day."""
    remove_shared_folders()
    for folder in _session_folders():
        with contextlib.suppress(OSError):  # held, no folder of a run, or just removed
            lock = folder / LOCK
            age = time.time() - lock.stat().st_mtime
            if age < _START_SECONDS:
                continue
            with exclusive(lock, "another run"):
                _remove_shared_files(folder)
                if age > _LOGS_SECONDS:
                    shutil.rmtree(folder, ignore_errors=True)


def remove_shared_folders() -> None:
    """Remove the folders in /dev/shm of runs that were killed before they could (run/weights.py makes them).

    A living run holds the lock in its folder; one that has just begun has no lock there yet, and no weights.
    """
    for folder in _own(SHARED_MEMORY.glob(f"{PREFIX}*-*")):
        with contextlib.suppress(OSError):  # held, or just removed
            lock = folder / LOCK
            if not lock.exists() and time.time() - folder.stat().st_mtime < _START_SECONDS:
                continue
            with exclusive(lock, "another run"):
                shutil.rmtree(folder, ignore_errors=True)


def _session_folders() -> set[Path]:
    folders = candidates(Path(tempfile.gettempdir()))
    return _own(path for folder in folders for path in folder.glob(f"{PREFIX}????????"))


def _own(folders: Iterable[Path]) -> set[Path]:
    """Those that this user has made and nobody else can write to: what lies in them is believed."""
    own = set()
    for folder in folders:
        with contextlib.suppress(OSError):  # just removed
            status = folder.lstat()
            others_write = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
            if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not others_write:
                own.add(folder)
    return own


def _driver_of(folder: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int((folder / LOCK).read_text(encoding="utf-8"))
    return None


def _end_processes(folder: Path) -> None:
    """End what writes into a session's folder, and remove what that has in /dev/shm."""
    shared = shared_files_of(caretaker.writers(folder))  # also of an engine that was about to start
    caretaker.end_writers(folder)
    _remove_shared(shared)
    _remove_shared_files(folder)


def _remove_shared_files(folder: Path) -> None:
    _remove_shared(path.name for path in SHARED_MEMORY.glob(f"sem.{folder.name}-*"))
    with contextlib.suppress(FileNotFoundError):
        _remove_shared((folder / _SHARED_FILES).read_text(encoding="utf-8").splitlines())


def _remove_shared(names: Iterable[str]) -> None:
    for name in names:
        path = SHARED_MEMORY / Path(name).name
        with contextlib.suppress(OSError):
            if path.lstat().st_uid == os.getuid():
                path.unlink()


def _remove_all_but_logs(folder: Path) -> None:
    """Leave the logs and the lock, by whose age they go; nothing where there are no logs."""
    ray = folder / _RAY
    if not any(ray.glob("session_*/logs")):
        shutil.rmtree(folder, ignore_errors=True)
        return
    kept = {path for logs in ray.glob("session_*/logs") for path in (logs, logs.parent)} | {folder / LOCK, ray}
    for path in (*ray.glob("session_*/*"), *ray.iterdir(), *folder.iterdir()):
        if path in kept:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
