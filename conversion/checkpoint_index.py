"""The index of a distributed checkpoint, `.metadata`: a pickle, read as plain data.

Its unpickler knows the dozen plain types that such an index is made of and refuses everything else. `plain_in_torch`
makes torch's own reader read it so too.
"""

import json
import pickle
import sys
from collections.abc import Mapping
from enum import Enum, EnumType
from pathlib import Path
from types import FunctionType
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

UnpicklingError = pickle.UnpicklingError  # of torch.load too
MARK = "metadata.json"
INDEX = ".metadata"
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
    *(("torch", name) for name in ("bool", "int16", "float8_e4m3fn", "float8_e5m2")),
}
# What a class, a function or a member of an enum has beside its __dict__.
_OWN = ("__class__", "__bases__", "__name__", "__qualname__", "__code__", "__defaults__", "__kwdefaults__")
_OWN += ("__module__", "__doc__", "__annotations__", "__type_params__")
# What unpickling a damaged file, and looking at what comes out, was seen to raise.
_OF_DAMAGE = (AttributeError, TypeError, ValueError, ImportError, MemoryError, RuntimeError)


class DistributedCheckpointError(ValueError):
    """A folder that is no distributed checkpoint, or a damaged one; the message names the file."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PLAIN_TYPES:
            raise UnpicklingError(f"it names {module}.{name}, which no index of a checkpoint needs")
        return super().find_class(module, name)


def _unpickled(file: BinaryIO) -> Any:
    """What an index holds. UnpicklingError where it names other things, or would change one of those it names.

    A pickle can set attributes of whatever it names, of a class too, which this process then has from it.
    """
    named = [getattr(sys.modules[module], name) for module, name in _PLAIN_TYPES if module in sys.modules]
    named += [member for kind in named if isinstance(kind, EnumType) for member in kind]
    before = [(thing, _attributes(thing)) for thing in named if isinstance(thing, type | FunctionType | Enum)]
    try:
        return _Unpickler(file).load()
    finally:
        if changed := [thing for thing, attributes in before if _put_back(thing, attributes)]:
            names = ", ".join(str(getattr(thing, "__qualname__", thing)) for thing in changed)
            raise UnpicklingError(f"it changes {names}, which no index of a checkpoint does")


def _attributes(thing: Any) -> dict[str, Any]:
    """The attributes of a class, a function or a member of an enum that can be set."""
    return {name: getattr(thing, name) for name in _OWN if hasattr(thing, name)} | dict(vars(thing))


def _put_back(thing: Any, attributes: Mapping[str, Any]) -> bool:
    """Give a thing these `_attributes` again; returns whether it had others."""
    now = _attributes(thing)
    new = now.keys() - attributes.keys()
    changed = [name for name, value in attributes.items() if now.get(name) is not value and now.get(name) != value]
    for name in new:
        delattr(thing, name)
    for name in changed:
        setattr(thing, name, attributes[name])
    return bool(new or changed)


def read_index(folder: Path) -> Metadata:
    """Return the index of a checkpoint as plain data. DistributedCheckpointError where it is none, or holds more."""
    try:
        backend = json.loads((folder / MARK).read_text(encoding="utf-8"))["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DistributedCheckpointError(f"{folder} is no distributed checkpoint: {MARK}: {error!r}") from error
    if backend != "torch_dist":
        raise DistributedCheckpointError(f"{folder / MARK}: sharded_backend {backend!r}, expected 'torch_dist'")
    try:
        with (folder / INDEX).open("rb") as file:
            metadata = _unpickled(file)
        if not isinstance(metadata, Metadata):
            raise TypeError(f"it holds a {type(metadata).__name__}")
        _check_index(metadata)
    except (OSError, UnpicklingError, EOFError, ArithmeticError, LookupError, *_OF_DAMAGE) as error:
        raise DistributedCheckpointError(f"{folder / INDEX} is damaged or no index of a checkpoint: {error}") from error
    return metadata


def _check_index(metadata: Metadata) -> None:
    """Raise TypeError or AttributeError unless all that is read later has its type."""
    places: Any = metadata.storage_data
    numbers = [number for place in places.values() for number in (place.offset, place.length)]
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            if not isinstance(entry.properties.dtype, torch.dtype):
                raise TypeError(f"the type of {name} is {entry.properties.dtype!r}")
            for chunk in entry.chunks:
                if not len(chunk.offsets) == len(chunk.sizes) == len(entry.size):
                    raise TypeError(f"a part of {name} has other dimensions")
                numbers += [*chunk.offsets, *chunk.sizes]
            numbers += entry.size
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise TypeError("a place in a file is no number")


def plain_in_torch() -> None:
    """Make torch, in this process, read the index of a checkpoint in this way, and no other file as one."""

    # No `kwargs`: with these torch would ask for a rank's own index, `__0.metadata`, where it does not like the whole.
    def read_metadata(self: FileSystemReader) -> Metadata:
        metadata = read_index(Path(self.path))
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata

    FileSystemReader.read_metadata = read_metadata  # pyright: ignore[reportAttributeAccessIssue]
