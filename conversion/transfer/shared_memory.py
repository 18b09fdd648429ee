"""Carries a plan out through shared memory: one file per source rank, which all target ranks on the machine map.

The sender packs each distinct piece once, cast to the wire's dtype; a receiver copies what it wants from the mapping
into its tensors. A file holds a header, then `WeightPlan.wire`. Files and mappings live as long as their objects: the
first touch of the pages costs several times a copy. Who waits for whom is the caller's matter: no receiver may unpack
while a sender packs. The header catches what is worst when that goes wrong: a file that was never fully packed.

A folder belongs to one run at a time. The sender's lock on its file tells a live run from what a killed one left.
"""

import errno
import fcntl
import mmap
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from conversion.plan import Piece, WeightPlan, WireLayout
from conversion.transfer import view

SHARED_MEMORY = Path("/dev/shm")

_HEADER_BYTES = 64
_PACKING = -1  # in the header while the sender writes; else the number of finished packs


class TransferError(RuntimeError):
    """What lies in shared memory is not what the receiver's plan expects, or is not complete."""


class SharedMemorySender:
    """The end at one source rank. Local to its process; holds the file and its mapping until `close`.

    `tensors` gives the local tensors by name; each pack reads what they hold then, on whatever device.
    """

    def __init__(
        self,
        plan: WeightPlan,
        rank: int,
        tensors: Mapping[str, Tensor],
        folder: str | Path = SHARED_MEMORY,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._tensors = tensors
        self._dtype = dtype
        self._wire = plan.wire(rank, dtype.itemsize)
        for piece in self._wire.offsets:
            view(tensors, piece)  # a plan for other tensors is refused before anything is written
        self._path = weight_file(folder, rank)
        self._descriptor = _create(self._path, _HEADER_BYTES + self._wire.total_bytes)
        self._buffer = _map(self._descriptor)
        self._header = self._buffer[:8].view(torch.int64)
        self._num_packs = 0

    @property
    def total_bytes(self) -> int:
        """Bytes this rank puts on the wire at each pack."""
        return self._wire.total_bytes

    @torch.no_grad()
    def pack(self) -> None:
        """Copies the pieces into shared memory, cast to the wire's dtype."""
        self._header.fill_(_PACKING)
        for piece in self._wire.offsets:
            _on_wire(self._buffer, self._wire, piece, self._dtype).copy_(view(self._tensors, piece))
        self._num_packs += 1
        self._header.fill_(self._num_packs)

    def close(self) -> None:
        """Removes the file; receivers keep their mapping until they close. Harmless if called twice."""
        if self._descriptor >= 0:
            self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = -1
            del self._buffer, self._header


class SharedMemoryReceiver:
    """The end at one target rank. Maps the files at the first unpack, so it may be made before the senders are."""

    def __init__(
        self,
        plan: WeightPlan,
        rank: int,
        tensors: Mapping[str, Tensor],
        folder: str | Path = SHARED_MEMORY,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._tensors = tensors
        self._dtype = dtype
        self._folder = folder
        self._copies = plan.to_rank(rank)
        for copy in self._copies:
            view(tensors, copy.target)
        sources = sorted({copy.source.rank for copy in self._copies})
        self._wires = {source: plan.wire(source, dtype.itemsize) for source in sources}
        self._buffers: dict[int, tuple[tuple[int, int], Tensor]] = {}

    @torch.no_grad()
    def unpack(self) -> None:
        """Copies this rank's pieces out of shared memory into its tensors, cast to their dtype. TransferError."""
        buffers = {source: self._buffer(source) for source in self._wires}
        packs = {source: _finished_packs(buffer, source) for source, buffer in buffers.items()}
        for copy in self._copies:
            source = copy.source.rank
            piece = _on_wire(buffers[source], self._wires[source], copy.source, self._dtype)
            view(self._tensors, copy.target).copy_(piece)
        if packs != {source: _finished_packs(buffer, source) for source, buffer in buffers.items()}:
            raise TransferError(f"{self._folder}: a sender packed while this receiver unpacked; the tensors are mixed")

    def close(self) -> None:
        """Lets go of the mappings."""
        self._buffers.clear()

    def _buffer(self, source: int) -> Tensor:
        """The mapping of a source's file: the one kept, unless a restarted sender has replaced the file."""
        path = weight_file(self._folder, source)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            raise TransferError(f"{path} does not exist: source rank {source} has no open sender") from None
        try:
            status = os.fstat(descriptor)
            identity = (status.st_dev, status.st_ino)
            expected = _HEADER_BYTES + self._wires[source].total_bytes
            if status.st_uid != os.geteuid() or status.st_size != expected:
                raise TransferError(
                    f"{path} has {status.st_size} bytes and owner {status.st_uid}, expected {expected} and "
                    f"{os.geteuid()}: it was written for another plan, dtype or run"
                )
            if self._buffers.get(source, (None,))[0] != identity:
                self._buffers[source] = (identity, _map(descriptor))
        finally:
            os.close(descriptor)
        return self._buffers[source][1]


def weight_file(folder: str | Path, rank: int) -> Path:
    """The file that source rank `rank` sends through."""
    return Path(folder) / f"weights-{rank:05d}.shm"


def _on_wire(buffer: Tensor, wire: WireLayout, piece: Piece, dtype: torch.dtype) -> Tensor:
    """The place of a piece in a mapped file."""
    start = _HEADER_BYTES + wire.offsets[piece]
    return buffer[start : start + piece.num_elements * dtype.itemsize].view(dtype).view(piece.shape)


def _finished_packs(buffer: Tensor, source: int) -> int:
    packs = int(buffer[:8].view(torch.int64).item())
    if packs < 1:
        state = "is still packing, or died while it did" if packs == _PACKING else "has not packed yet"
        raise TransferError(f"source rank {source} {state}: its shared memory holds no complete weights")
    return packs


def _create(path: Path, num_bytes: int) -> int:
    """A locked descriptor of a new file of this size, mode 0600, its memory reserved. Replaces what no one holds."""
    try:
        stale = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        pass
    else:
        try:
            fcntl.flock(stale, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        except BlockingIOError:
            raise FileExistsError(f"{path} is in use by another sender: give each run a folder of its own") from None
        finally:
            os.close(stale)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Without the reservation a full /dev/shm shows as a SIGBUS in the middle of a pack.
        os.posix_fallocate(descriptor, 0, num_bytes)
    except OSError as error:
        os.close(descriptor)
        path.unlink(missing_ok=True)
        if error.errno != errno.ENOSPC:
            raise
        free = os.statvfs(path.parent)
        raise OSError(
            errno.ENOSPC,
            f"{path.parent} has too little room for the weights: {num_bytes} bytes wanted, "
            f"{free.f_bavail * free.f_frsize} free; enlarge it (docker: --shm-size) or give another folder",
        ) from error
    return descriptor


def _map(descriptor: int) -> Tensor:
    """The whole file as a flat tensor of bytes; the tensor keeps the mapping alive."""
    return torch.frombuffer(mmap.mmap(descriptor, os.fstat(descriptor).st_size), dtype=torch.uint8)
