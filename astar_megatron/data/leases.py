"""Leases: which of several jobs works on what, by files on a file system that all of them share.

    <folder>/<owner>.beat         who the owner is, and a count that grows while it lives
    <folder>/<name>.<generation>  a lease: a hard link to its owner's .beat, so it shows the owner's count

A lease is taken by link(2), which is atomic on local disks and on NFS. Who finds another's lease counts it as expired
when its owner's process is gone (same machine) or its count stood still for `expiry_seconds` by the observer's own
clock: no two machines' clocks are compared. It is then succeeded by the next generation, which one process alone can
create; who created one looks again, and steps back if it finds a lease that was not there before.

A lease saves work, it protects nothing: a job that was paused past its expiry works on beside its successor.
"""

import errno
import json
import os
import socket
import threading
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import Self

from astar_megatron.data.files import make_folder, storage_error

_COUNT_DIGITS = 12


class Leases:
    """The leases of one job in `folder`. A context manager: inside it beats, and at its end all are given back."""

    def __init__(self, folder: Path, *, expiry_seconds: float = 60.0) -> None:
        self._folder, self._expiry_seconds = folder, expiry_seconds
        self.owner = f"{socket.gethostname()}-{os.getpid()}-{token_hex(4)}"
        self._beat_path = folder / f"{self.owner}.beat"
        self._held: dict[str, Path] = {}
        self._seen: dict[str, tuple[dict[str, str], float]] = {}  # owner -> its beat as last read, and when it changed
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="leases", daemon=True)

    def __enter__(self) -> Self:
        """Make the folder and the beat. Raises StorageError on a file system that is read-only or full."""
        make_folder(self._folder)
        try:
            self._write_beat(0)
        except OSError as error:
            raise storage_error(f"{self._beat_path}: can't take leases of the V* table", error) from error
        _unlink([path for path in self._folder.glob("*.beat") if _gone(_beat_in(path))])  # its leases keep the text
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()
        self.release(list(self._held))
        with suppress(OSError):
            self._beat_path.unlink()

    def claim(self, names: Sequence[str]) -> list[str]:
        """Return those of `names` that are this job's from now on; the others are held by jobs that live.

        What an earlier holder did is to be read after this call. Raises StorageError.
        """
        before, created = self._leases(), {}
        for name in names:
            older = before.get(name, {})
            if name in self._held or not all(self._expired(path) for path in older.values()):
                continue
            path = self._folder / f"{name}.{max(older, default=0) + 1}"
            try:
                os.link(self._beat_path, path)
            except FileExistsError:
                continue  # somebody was quicker
            except OSError as error:
                raise storage_error(f"{path}: can't take a lease of the V* table (a hard link)", error) from error
            created[name] = path
        after = self._leases() if created else {}
        for name, path in created.items():
            older = before.get(name, {})
            taken = after.get(name, {}).keys() - older.keys() - {max(older, default=0) + 1}
            if taken or not all(self._expired(old) for old in older.values()):  # generations begin again at 1
                _unlink([path])
                continue
            _unlink(older.values())
            self._held[name] = path
        return [name for name in names if self._held.get(name) == created.get(name, "")]

    def release(self, names: Collection[str]) -> None:
        """Give leases back; what was done under them must be on disk.

        One that was succeeded while this job slept is not its own any more, even if its file's name is there again.
        """
        for path in [self._held.pop(name) for name in names]:
            with suppress(OSError):
                if path.samefile(self._beat_path):
                    path.unlink()

    def _leases(self) -> dict[str, dict[int, Path]]:
        """Name -> generation -> file, of all leases that there are."""
        leases: dict[str, dict[int, Path]] = {}
        for path in self._folder.iterdir():
            name, _, generation = path.name.rpartition(".")
            if generation.isdecimal():
                leases.setdefault(name, {})[int(generation)] = path
        return leases

    def _expired(self, path: Path) -> bool:
        beat = _beat_in(path)
        if beat is None or _gone(beat):
            return True
        now = time.monotonic()
        owner = beat.get("owner", str(path))
        if owner not in self._seen or self._seen[owner][0] != beat:
            self._seen[owner] = beat, now
        return now - self._seen[owner][1] > self._expiry_seconds

    def _beat(self) -> None:
        count = 0
        while not self._end.wait(self._expiry_seconds / 6):
            count += 1
            with suppress(OSError):  # a full or absent file system: at worst the leases expire
                self._write_beat(count)

    def _write_beat(self, count: int) -> None:
        # In place, so that every lease, being the same file, shows it.
        pid = str(os.getpid())
        beat = {"owner": self.owner, "machine": _machine(), "pid": pid, "started": _started(pid)}
        beat |= {"time": time.strftime("%Y-%m-%d %H:%M:%S"), "count": f"{count:0{_COUNT_DIGITS}d}"}
        descriptor = os.open(self._beat_path, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            data = json.dumps(beat).encode()
            if os.pwrite(descriptor, data, 0) < len(data):  # how a disk that is nearly full answers
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(descriptor)


def _unlink(paths: Collection[Path]) -> None:
    for path in paths:
        with suppress(OSError):
            path.unlink()


def _beat_in(path: Path) -> dict[str, str] | None:
    """What a beat or a lease says, nothing where it can't be read; None if it is not there any more."""
    try:
        beat = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:  # a count half written, or not ours
        return {}
    return beat if isinstance(beat, dict) else {}


def _gone(beat: dict[str, str] | None) -> bool:
    """Whether the owner is a process of this machine that has ended."""
    if not beat or not beat.get("machine") or beat["machine"] != _machine():
        return False
    return beat.get("started") != _started(beat.get("pid", ""))


def _machine() -> str:
    """What two processes have in common that see each other's ids: the boot and the pid namespace; "" unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _started(pid: str) -> str:
    """When a process of this machine started, in the kernel's ticks; "" if it does not run."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else fields[18]
