"""A file of shared memory, mapped: words on cache lines of their own, and the two slots that buckets take turns in.

Its creator holds a lock on the first line for as long as it lives, and everyone else who writes a word one on that
word's line. That tells a live run from what a killed one left, and keeps whoever waits for another process from waiting
for nobody.
"""

import errno
import fcntl
import mmap
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from conversion.transfer.buckets import Schedule

LINE_BYTES = 64
CREATOR = 0  # the line whose lock the creator of a file holds
_LOOK_SECONDS = 0.5  # a look at a lock is a call of the kernel: so often at most
_FLOCK = "hhqqi4x"  # struct flock of fcntl(2): type, whence, start, length, pid


def create(path: Path, num_bytes: int) -> int:
    """A descriptor of a new file of this size, mode 0600, its memory reserved. Replaces what no one holds.

    It has its name when it is `finished`: who opens it before that would read what is not there yet.
    """
    unfinished = _unfinished(path)
    with _alone_in(path.parent):
        _remove_stale(unfinished)  # first: it may get its name meanwhile
        _remove_stale(path)
        descriptor = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        _hold(descriptor, CREATOR)
    try:
        # Without the reservation a full /dev/shm shows as a SIGBUS in the middle of a pack.
        os.posix_fallocate(descriptor, 0, num_bytes)
    except OSError as error:
        os.close(descriptor)
        unfinished.unlink(missing_ok=True)
        if error.errno != errno.ENOSPC:
            raise
        free = os.statvfs(path.parent)
        raise OSError(
            errno.ENOSPC,
            f"{path.parent} has too little room for the weights: {num_bytes} bytes wanted, "
            f"{free.f_bavail * free.f_frsize} free; enlarge it (docker: --shm-size) or give another folder",
        ) from error
    return descriptor


def finished(path: Path) -> None:
    """Give a created file its name."""
    _unfinished(path).rename(path)


def _unfinished(path: Path) -> Path:
    return path.with_name(f"{path.name}.new")


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """No other creator is between its look at a folder and its lock on a new file there."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove_stale(path: Path) -> None:
    try:
        stale = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if _is_held(stale, CREATOR):
            raise FileExistsError(f"{path} is in use by another sender: give each run a folder of its own")
        path.unlink()
    finally:
        os.close(stale)


class MappedFile:
    """An open, mapped file. Takes over the descriptor."""

    def __init__(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        self.descriptor = descriptor
        self.identity = (status.st_dev, status.st_ino)
        self.owner, self.num_bytes = status.st_uid, status.st_size
        self._looked: dict[int, float] = {}  # when at the lock of a line
        self._map = mmap.mmap(descriptor, status.st_size) if status.st_size else None
        nothing = torch.empty(0, dtype=torch.uint8)
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8) if self._map is not None else nothing
        whole = status.st_size // 8 * 8
        self._words = memoryview(self._map)[:whole].cast("q") if self._map is not None else memoryview(b"")

    def read(self, line: int) -> int:
        """The word at the start of a line."""
        return self._words[line * LINE_BYTES // 8]

    def write(self, line: int, value: int) -> None:
        """Sets the word at the start of a line."""
        self._words[line * LINE_BYTES // 8] = value

    def hold(self, line: int) -> None:
        """Holds the lock of a line until this file is closed, or the process ends in whatever way."""
        _hold(self.descriptor, line)

    def is_held(self, line: int) -> bool | None:
        """True if someone else holds the lock of a line, None if it was looked up within the last half second."""
        now = time.monotonic()
        if now - self._looked.get(line, 0.0) < _LOOK_SECONDS:
            return None
        self._looked[line] = now
        return _is_held(self.descriptor, line)

    def close(self) -> None:
        """Lets go of the file; the mapping ends with the last tensor that looks into it."""
        self._words.release()
        self.bytes = torch.empty(0, dtype=torch.uint8)
        os.close(self.descriptor)
        self.descriptor = -1


class Slots:
    """The slots are the end of the file; in a GPU's memory, with handles there instead, see cuda_ipc.DeviceSlots."""

    def num_bytes(self, order: Schedule, num_receivers: int) -> int:
        """What they need of the end of the file."""
        return order.num_slots * order.slot_bytes

    def create(self, file: MappedFile, order: Schedule, num_receivers: int) -> Tensor:
        """The slots as bytes, for the sender."""
        return file.bytes[file.num_bytes - self.num_bytes(order, num_receivers) :]

    def open(self, file: MappedFile, order: Schedule, receiver: int) -> Tensor:
        """The same slots, for a receiver."""
        return self.create(file, order, receiver + 1)

    def settle(self) -> None:
        """Returns when the copies into or out of a slot have been made; those of a host's memory are."""


IN_THE_FILE = Slots()


# Locks of the open file, not of the process: another part of it that opens and closes the file must not free them.
def _hold(descriptor: int, line: int) -> None:
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _lock(fcntl.F_RDLCK, line))


def _is_held(descriptor: int, line: int) -> bool:
    answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _lock(fcntl.F_WRLCK, line))
    return struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK


def _lock(kind: int, line: int) -> bytes:
    return struct.pack(_FLOCK, kind, os.SEEK_SET, line * LINE_BYTES, 1, 0)
