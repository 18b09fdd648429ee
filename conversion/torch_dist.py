"""Megatron's distributed checkpoints (dist_checkpointing, format torch_dist), chunk by chunk. Imports no Megatron.

Such a folder belongs to no layout: tensors lie under their global names and shapes, cut into chunks, the layers of one
kind stacked in a leading dimension. It is torch.distributed.checkpoint's format with a metadata.json beside it.

The index of the chunks is read as plain data (checkpoint_index.py), the chunks themselves with weights_only, their
numbers straight from the file.
"""

import io
import json
import warnings
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo  # the format itself names it
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.serialization import get_crc32_options, set_crc32_options

from conversion.checkpoint_index import INDEX, MARK, DistributedCheckpointError, UnpicklingError, read_index
from conversion.mapping import FileSlice, PiecewiseFile, mapped
from conversion.tiles import Span

_ALIGNMENT = 64  # bytes: where a chunk may begin in a file that is written here
Shape = tuple[int, ...]
Index = tuple[Span, ...]  # one (start, stop) per dimension of a global tensor


class CheckpointReader:
    """The tensors of a distributed checkpoint, by their global names. Holds none of them."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        metadata = read_index(self.folder)
        self._storage: Mapping[MetadataIndex, Any] = metadata.storage_data
        self._tensors = {
            name: entry
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._data_offsets: dict[MetadataIndex, int] = {}
        self._of_plane: dict[str, dict[Shape, list[tuple[MetadataIndex, Index, str]]]] = {}

    def shapes(self) -> dict[str, Shape]:
        """Global shape of every tensor, the optimizer's included."""
        return {name: tuple(entry.size) for name, entry in self._tensors.items()}

    def dtype(self, name: str) -> torch.dtype:
        """The type a tensor is stored in."""
        return self._tensors[name].properties.dtype

    def check(self, names: Iterable[str]) -> None:
        """Raise DistributedCheckpointError unless every file that holds a part of these tensors is there, and long."""
        sizes: dict[str, int] = {}
        for name in names:
            for key, _, file in self.chunks(name):
                place, path = self._storage[key], self.folder / file
                if file not in sizes:
                    if not path.is_file():
                        raise DistributedCheckpointError(f"{path} is missing, {self.folder / INDEX} names it")
                    sizes[file] = path.stat().st_size
                if place.offset + place.length > sizes[file]:
                    raise DistributedCheckpointError(
                        f"{path} is truncated: {place.offset + place.length} bytes wanted, {sizes[file]} there"
                    )

    def chunks(self, name: str, planes: Shape = ()) -> Sequence[tuple[MetadataIndex, Index, str]]:
        """Key, spans and file of a tensor's chunks; where it is a stack that is cut by plane, of one plane only."""
        if name not in self._of_plane:
            entry, of_plane = self._tensors[name], defaultdict(list)
            stacked = all(size == 1 for chunk in entry.chunks for size in chunk.sizes[:-2])
            for chunk in entry.chunks:
                key = MetadataIndex(name, chunk.offsets)
                file = getattr(self._storage.get(key), "relative_path", None)
                if not isinstance(file, str) or Path(file).name != file:
                    raise DistributedCheckpointError(f"{self.folder / INDEX} names {file!r} for a part of {name}")
                spans = tuple((start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))
                of_plane[tuple(chunk.offsets[:-2]) if stacked else ()].append((key, spans, file))
            self._of_plane[name] = dict(of_plane)
        groups = self._of_plane[name]
        return groups.get(planes, []) if planes in groups else [chunk for group in groups.values() for chunk in group]

    def read(self, name: str, index: Index) -> Tensor:
        """Return `name[index]`: mapped where one chunk holds it, else put together. DistributedCheckpointError."""
        if name not in self._tensors:
            raise DistributedCheckpointError(f"{self.folder} does not hold {name}")
        entry = self._tensors[name]
        if len(index) != len(entry.size) or any(stop > n for (_, stop), n in zip(index, entry.size, strict=True)):
            raise DistributedCheckpointError(f"{self.folder}: {name} has shape {tuple(entry.size)}, wanted is {index}")
        shape = [stop - start for start, stop in index]
        out, num_filled, wanted = None, 0, torch.Size(shape).numel()
        for key, spans, file in self.chunks(name, tuple(start for start, _ in index[:-2])):
            common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(index, spans, strict=True)]
            if any(start >= stop for start, stop in common):
                continue
            here = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(common, spans, strict=True))
            part = self._chunk(key, tuple(b - a for a, b in spans), file)[here]
            if part.numel() == wanted:
                return part
            out = torch.empty(shape, dtype=entry.properties.dtype) if out is None else out
            out[tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(common, index, strict=True))] = part
            num_filled += part.numel()
        if out is None or num_filled != wanted:
            raise DistributedCheckpointError(f"{self.folder}: the chunks of {name} do not cover {index}")
        return out

    def _chunk(self, key: MetadataIndex, shape: Shape, file: str) -> Tensor:
        path, place, dtype = self.folder / file, self._storage[key], self.dtype(key.fqn)
        try:
            if key not in self._data_offsets:
                self._data_offsets[key] = _data_offset(path, place.offset, place.length, shape, dtype)
            if self._data_offsets[key] >= 0:
                return mapped(path, self._data_offsets[key], shape, dtype)
            with path.open("rb") as stream:
                part: Any = FileSlice(stream, place.offset, place.length)
                return _as_tensor(torch.load(part, weights_only=True))
        except OSError as error:
            raise DistributedCheckpointError(f"{path} is not readable: {error.strerror}") from error
        except (RuntimeError, ValueError, EOFError, KeyError, *_BAD_BLOB) as error:
            raise DistributedCheckpointError(
                f"{path} is damaged: what begins at byte {place.offset} is no part of {key.fqn} of shape {shape} in "
                f"{dtype}; take it from a copy, or use another checkpoint"
            ) from error


_BAD_BLOB = (zipfile.BadZipFile, UnpicklingError, NotImplementedError)


def _as_tensor(chunk: object) -> Tensor:
    if not isinstance(chunk, Tensor):
        raise ValueError(f"a chunk is a {type(chunk).__name__}, expected a tensor")
    return chunk


def _data_offset(path: Path, offset: int, length: int, shape: Shape, dtype: torch.dtype) -> int:
    """Where in the file the numbers of a chunk begin; -1 if they do not lie there plain and in order.

    A chunk is what torch.save writes: a zip archive of stored entries, the numbers in the one called data/0.
    """
    with path.open("rb") as stream:
        blob: Any = FileSlice(stream, offset, length)
        with zipfile.ZipFile(blob) as archive:
            entries = [entry for entry in archive.infolist() if entry.filename.endswith("/data/0")]
        blob.seek(0)
        chunk = _as_tensor(torch.load(blob, map_location="meta", weights_only=True))
        if tuple(chunk.shape) != shape or chunk.dtype != dtype:
            raise ValueError(f"a chunk of {tuple(chunk.shape)} in {chunk.dtype}, expected {shape} in {dtype}")
        plain = len(entries) == 1 and entries[0].compress_type == zipfile.ZIP_STORED and chunk.is_contiguous()
        if not plain or chunk.storage_offset() or entries[0].file_size != chunk.nbytes:
            return -1
        blob.seek(entries[0].header_offset + 26)  # of the local header: the lengths of name and extra field
        name, extra = (int.from_bytes(blob.read(2), "little") for _ in range(2))
        return offset + entries[0].header_offset + 30 + name + extra


def is_checkpoint(folder: str | Path) -> bool:
    """Whether the folder is a distributed checkpoint, by its metadata.json."""
    return (Path(folder) / MARK).is_file() and (Path(folder) / INDEX).is_file()


def write(
    folder: str | Path,
    chunks: Mapping[str, Sequence[Index]],
    read: Callable[[str, Index], Tensor],
    dtype: torch.dtype,
    objects: Mapping[str, object],
    threads: int = 1,
) -> None:
    """Write a distributed checkpoint into an empty folder, one chunk a thread in memory at a time; nothing is synced.

    `chunks` are the parts of every global tensor, which together are the whole; `read(name, index)` gives one, of
    `dtype`, in any thread. `objects` are what Megatron keeps beside tensors, by their keys.
    """
    with warnings.catch_warnings(), _without_crc32():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            save(
                {},
                storage_writer=_Writer(folder, threads),
                planner=_Planner(chunks, read, dtype, objects),
                no_dist=True,
            )
        except CheckpointException as error:  # no Exception, and what went wrong is inside
            raise error.failures[0][0] from None
    (Path(folder) / MARK).write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))


@contextmanager
def _without_crc32() -> Iterator[None]:
    """Lets torch.save leave out the zip archives' checksums, which torch.load never looks at: see `verify` instead."""
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)


class _Writer(FileSystemWriter):
    """Writes a file a thread. FileSystemWriter's own threads lose their errors, a full disk's among them."""

    def __init__(self, folder: str | Path, threads: int) -> None:
        super().__init__(str(folder), sync_files=False)
        self._folder, self._threads, self._stopped = Path(folder), threads, False

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        items = sorted(plan.items, key=_bytes_of, reverse=True)
        shares = [items[i :: self._threads] for i in range(self._threads)]  # of about as many bytes each
        with ThreadPoolExecutor(self._threads) as pool:
            written = [pool.submit(self._file, i, share, planner) for i, share in enumerate(shares) if share]
            try:
                results = [result for file in written for result in file.result()]
            except BaseException:  # an error of one thread, a signal
                self._stopped = True
                raise
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def _file(self, number: int, items: Sequence[WriteItem], planner: SavePlanner) -> list[WriteResult]:
        name, results = f"__0_{number}.distcp", []
        with PiecewiseFile(self._folder / name, "xb") as stream:
            for item in items:
                if self._stopped:
                    break
                stream.write(bytes(-stream.tell() % _ALIGNMENT))
                offset, data = stream.tell(), planner.resolve_data(item)
                if isinstance(data, io.BytesIO):
                    stream.write(data.getbuffer())
                else:
                    _save(data, stream)
                length = stream.tell() - offset
                results.append(
                    WriteResult(index=item.index, size_in_bytes=length, storage_data=_StorageInfo(name, offset, length))
                )
        return results


def _save(data: Tensor, stream: PiecewiseFile) -> None:
    try:
        torch.save(data, stream)
    except RuntimeError as error:  # torch's own, about a position, in place of a full disk
        raise (stream.failure or error) from None


def _bytes_of(item: WriteItem) -> int:
    data = item.tensor_data
    return 0 if data is None or data.chunk is None else data.chunk.sizes.numel() * data.properties.dtype.itemsize


class _Planner(SavePlanner):
    """A plan of chunks that are read when they are written."""

    def __init__(
        self,
        chunks: Mapping[str, Sequence[Index]],
        read: Callable[[str, Index], Tensor],
        dtype: torch.dtype,
        objects: Mapping[str, object],
    ) -> None:
        self._read, self._objects = read, objects
        self._index_of: dict[MetadataIndex, Index] = {}
        self._items: list[WriteItem] = []
        for name, parts in chunks.items():
            size = torch.Size([max(part[d][1] for part in parts) for d in range(len(parts[0]))])
            for part in parts:
                key = MetadataIndex(name, [start for start, _ in part])
                self._index_of[key] = part
                chunk = ChunkStorageMetadata(
                    offsets=torch.Size([start for start, _ in part]),
                    sizes=torch.Size([stop - start for start, stop in part]),
                )
                data = TensorWriteData(chunk=chunk, properties=TensorProperties(dtype=dtype), size=size)
                self._items.append(WriteItem(index=key, type=WriteItemType.SHARD, tensor_data=data))
        self._items += [WriteItem(index=MetadataIndex(name), type=WriteItemType.BYTE_IO) for name in objects]

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """Nothing: the plan does not depend on a state dict."""

    def create_local_plan(self) -> SavePlan:
        return SavePlan(self._items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type != WriteItemType.BYTE_IO:
            part = self._read(write_item.index.fqn, self._index_of[write_item.index])
            return part if part.untyped_storage().nbytes() == part.nbytes else part.clone()
        buffer = io.BytesIO()
        torch.save(self._objects[write_item.index.fqn], buffer)
        return buffer
