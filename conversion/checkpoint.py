"""Megatron's distributed checkpoints (dist_checkpointing, format torch_dist), chunk by chunk. Imports no Megatron.

Such a folder belongs to no layout: tensors lie under their global names and shapes, cut into chunks, the layers of one
kind stacked in a leading dimension. It is torch.distributed.checkpoint's format with a metadata.json beside it.

The index of the chunks is a pickle. It is read by an unpickler that knows the dozen plain types such an index is made
of and refuses everything else; the chunks themselves are read with weights_only.
"""

import io
import json
import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save

from conversion.tiles import Span

MARK = "metadata.json"
_INDEX = ".metadata"
_HELD = 16  # chunks: what makes up one HF parameter, for most layouts
_CHECKPOINT = "torch.distributed.checkpoint"
_PLAIN_TYPES = {
    (f"{_CHECKPOINT}.metadata", name)
    for name in (
        *("Metadata", "MetadataIndex", "StorageMeta", "BytesStorageMetadata", "TensorStorageMetadata"),
        *("ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
    )
} | {
    (f"{_CHECKPOINT}.filesystem", "_StorageInfo"),
    *((f"{_CHECKPOINT}.planner", name) for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("torch", "Size"),
    *(("torch", name) for name in ("float32", "float64", "float16", "bfloat16", "uint8", "int8", "int32", "int64")),
}

Shape = tuple[int, ...]
Index = tuple[Span, ...]  # one (start, stop) per dimension of a global tensor


class DistributedCheckpointError(ValueError):
    """A folder that is no distributed checkpoint, or a damaged one; the message names the file."""


class CheckpointReader:
    """The tensors of a distributed checkpoint, by their global names; holds a few chunks at a time."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        metadata = _read_index(self.folder)
        self._storage: Mapping[MetadataIndex, Any] = metadata.storage_data
        self._tensors = {
            name: entry
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._chunk = lru_cache(_HELD)(self._read_chunk)

    def shapes(self) -> dict[str, Shape]:
        """Global shape of every tensor, the optimizer's included."""
        return {name: tuple(entry.size) for name, entry in self._tensors.items()}

    def dtype(self, name: str) -> torch.dtype:
        """The type a tensor is stored in."""
        return self._tensors[name].properties.dtype

    def read(self, name: str, index: Index) -> Tensor:
        """Return `name[index]`, put together from the chunks it lies in. DistributedCheckpointError."""
        if name not in self._tensors:
            raise DistributedCheckpointError(f"{self.folder} does not hold {name}")
        entry = self._tensors[name]
        if len(index) != len(entry.size) or any(stop > n for (_, stop), n in zip(index, entry.size, strict=True)):
            raise DistributedCheckpointError(f"{self.folder}: {name} has shape {tuple(entry.size)}, wanted is {index}")
        out = torch.empty([stop - start for start, stop in index], dtype=entry.properties.dtype)
        found = 0
        for chunk in entry.chunks:
            spans = [(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True)]
            common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(index, spans, strict=True)]
            if any(start >= stop for start, stop in common):
                continue
            here = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(common, spans, strict=True))
            there = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(common, index, strict=True))
            out[there] = self._chunk(MetadataIndex(name, chunk.offsets))[here]
            found += out[there].numel()
        if found != out.numel():
            raise DistributedCheckpointError(f"{self.folder}: the chunks of {name} do not cover {index}")
        return out

    def _read_chunk(self, key: MetadataIndex) -> Tensor:
        place = self._storage[key]
        path = self.folder / place.relative_path
        if path.parent != self.folder:
            raise DistributedCheckpointError(f"{self.folder / _INDEX} names {place.relative_path!r}")
        try:
            with path.open("rb") as file:
                file.seek(place.offset)
                data = file.read(place.length)
            if len(data) != place.length:
                raise EOFError(f"{place.length} bytes wanted at {place.offset}, {len(data)} there")
            return torch.load(io.BytesIO(data), weights_only=True)
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            raise DistributedCheckpointError(f"{path} is damaged, truncated or not readable: {error}") from error


def is_checkpoint(folder: str | Path) -> bool:
    """Whether the folder is a distributed checkpoint, by its metadata.json."""
    return (Path(folder) / MARK).is_file() and (Path(folder) / _INDEX).is_file()


def write(
    folder: str | Path,
    chunks: Mapping[str, Sequence[Index]],
    read: Callable[[str, Index], Tensor],
    dtype: torch.dtype,
    objects: Mapping[str, object],
) -> None:
    """Write a distributed checkpoint into an empty folder, one chunk in memory at a time.

    `chunks` are the parts of every global tensor, which together are the whole; `read(name, index)` gives one, of
    `dtype`. `objects` are what Megatron keeps beside tensors, by their keys.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        save(
            {},
            storage_writer=FileSystemWriter(str(folder), thread_count=1, sync_files=True),
            planner=_Planner(chunks, read, dtype, objects),
            no_dist=True,
        )
    (Path(folder) / MARK).write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))


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
            return self._read(write_item.index.fqn, self._index_of[write_item.index]).contiguous()
        buffer = io.BytesIO()
        torch.save(self._objects[write_item.index.fqn], buffer)
        return buffer


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PLAIN_TYPES:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no index of a checkpoint needs")
        return super().find_class(module, name)


def _read_index(folder: Path) -> Metadata:
    try:
        backend = json.loads((folder / MARK).read_text(encoding="utf-8"))["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DistributedCheckpointError(f"{folder} is no distributed checkpoint: {MARK}: {error!r}") from error
    if backend != "torch_dist":
        raise DistributedCheckpointError(f"{folder / MARK}: sharded_backend {backend!r}, expected 'torch_dist'")
    try:
        with (folder / _INDEX).open("rb") as file:
            metadata = _IndexUnpickler(file).load()
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError) as error:
        raise DistributedCheckpointError(
            f"{folder / _INDEX} is damaged or no index of a checkpoint: {error}"
        ) from error
    if not isinstance(metadata, Metadata):
        raise DistributedCheckpointError(f"{folder / _INDEX} holds a {type(metadata).__name__}, no index")
    return metadata
