"""Tensors in files: mapped to be read, so that what is let go of is not held, and written in pieces; parts of files."""

import io
import math
import mmap
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def mapped(path: Path, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return the tensor whose bytes begin `offset` bytes into the file. EOFError where the file ends before it does.

    Writing to it changes nothing in the file. The mapping ends with the last tensor that looks into it.
    """
    count = math.prod(shape)
    if not count:
        return torch.empty(shape, dtype=dtype)
    start = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    stop = offset + count * dtype.itemsize
    with path.open("rb") as file:
        there = os.fstat(file.fileno()).st_size
        if stop > there:  # to touch what is not there would be a SIGBUS
            raise EOFError(f"{stop} bytes wanted, {there} there")
        pages = mmap.mmap(file.fileno(), stop - start, access=mmap.ACCESS_COPY, offset=start)
    return torch.frombuffer(pages, dtype=dtype, offset=offset - start, count=count).view(shape)


class PiecewiseFile(io.FileIO):
    """A file that writes everything it is given, in pieces: 16 MiB at once take Linux ten times as long as by 1 MiB."""

    PIECE_BYTES = 1 << 20
    failure: OSError | None = None  # of a write

    def write(self, data: Any) -> int:
        """Write all of `data` and return its length in bytes."""
        rest = memoryview(data).cast("B")
        count = len(rest)
        try:
            while rest:
                rest = rest[super().write(rest[: self.PIECE_BYTES]) :]
        except OSError as error:
            self.failure = OSError(error.errno, f"can't write {self.name}: {error.strerror}")
            raise self.failure from None
        return count


class FileSlice(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: Any, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset + self._at)
        count = self._file.readinto(memoryview(buffer)[: max(0, self._length - self._at)])
        self._at += count
        return count
