"""HF folders as the source and the target of plans: safetensors in, safetensors out.

`load` reads only the rectangles a rank holds, shard by shard. `save` writes a folder that transformers and vLLM open;
it appears as a whole or not at all. Pickle checkpoints are refused: opening one runs whatever code it holds.
"""

import json
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from conversion.families import read_model
from conversion.plan import Copy, WeightPlan
from conversion.transfer import view

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
RECORD = "conversion.json"  # what every export carries: it may be replaced, a folder without it is somebody's own

_TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES = tuple(_TORCH_DTYPES)
_COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


class CheckpointError(ValueError):
    """An HF folder that is incomplete, damaged or not the model the plan describes; the message names the file."""


def check(folder: str | Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Return which file holds which parameter. CheckpointError unless the folder holds exactly `shapes`.

    Reads headers, no weights.
    """
    folder = Path(folder)
    return _check(folder, _weight_files(folder), shapes)


def read(file: Path, name: str) -> Tensor:
    """Return one tensor of a safetensors file, whole."""
    with _opened(file) as shard:
        return shard.get_tensor(name)


def stored_dtype(folder: Path, holder: Mapping[str, str]) -> torch.dtype:
    """The one type of the parameters in `holder` (as `check` gives it). CheckpointError if they have several."""
    found: dict[str, str] = {}
    for file in sorted(set(holder.values())):
        with _opened(folder / file) as shard:
            for name in shard.keys():  # noqa: SIM118 - no mapping
                found.setdefault(shard.get_slice(name).get_dtype(), name)
    if len(found) != 1:
        raise CheckpointError(f"{folder} mixes types ({found}): convert it to one first, for example with transformers")
    return _TORCH_DTYPES[next(iter(found))]


@torch.no_grad()
def load(folder: str | Path, plan: WeightPlan, rank: int, tensors: Mapping[str, Tensor]) -> None:
    """Fills the local tensors of target rank `rank` from an HF folder, cast to their dtype.

    `plan` goes from `Model.hf_tiles()` to the layout of the tensors. Local: each rank reads for itself. The folder is
    checked whole, against all the parameters of the plan, before the first tensor is written.
    """
    folder = Path(folder)
    files = _weight_files(folder)
    shapes = _shapes(plan)
    by_file: dict[str, list[Copy]] = defaultdict(list)
    holder = _check(folder, files, shapes)
    for copy in plan.to_rank(rank):
        by_file[holder[copy.source.name]].append(copy)
    for file, copies in by_file.items():
        with _opened(folder / file) as shard:
            for copy in copies:
                piece = shard.get_slice(copy.source.name)[copy.source.slices]
                view(tensors, copy.target).copy_(piece)


def save(
    folder: str | Path,
    tensors: Mapping[str, Tensor],
    source_folder: str | Path,
    max_shard_bytes: int | float = 5e9,
) -> None:
    """Writes an HF folder with these weights and the configuration and tokenizer of `source_folder`; see `write`.

    The tensors are the model's parameters under their HF names, of one dtype; a tied head is left out if given.
    """
    model = read_model(source_folder)
    weights = {name: t for name, t in tensors.items() if not (model.tied and name == "lm_head.weight")}
    dtype = _check_weights(weights, model.parameters())
    write(folder, weights.__getitem__, dtype, source_folder, max_shard_bytes=max_shard_bytes)


@torch.no_grad()
def write(
    folder: str | Path,
    parameter: Callable[[str], Tensor],
    dtype: torch.dtype,
    source_folder: str | Path,
    record: Mapping[str, Any] | None = None,
    max_shard_bytes: int | float = 5e9,
) -> None:
    """Writes an HF folder whose weights `parameter` gives by name, one at a time: only one is held.

    Configuration and tokenizer are those of `source_folder`; the dtype in config.json becomes `dtype`, for readers cast
    to what it says. `record` is added to conversion.json. The folder is written beside its final place and renamed; an
    export that is there already, known by its conversion.json, is replaced (a kill between the two renames leaves the
    old one as `.NAME.old`). Anything else that is there is refused.
    """
    source_folder = Path(source_folder)
    model = read_model(source_folder)
    name_of_dtype = str(dtype).removeprefix("torch.")
    with replacing(folder) as new:
        _write_weights(new, model.parameters(), parameter, dtype, max_shard_bytes)
        config = {key: value for key, value in model.config.items() if key != "torch_dtype"}
        write_json(new / "config.json", config | {"dtype": name_of_dtype})
        write_json(new / RECORD, {"source": source_folder.name, "dtype": name_of_dtype} | dict(record or {}))
        copy_companions(source_folder, new)


def copy_companions(source_folder: Path, folder: Path) -> None:
    """Copies what belongs to a model beside its weights and config.json: tokenizer, template, generation defaults."""
    for name in _COMPANIONS:
        if (source_folder / name).is_file():
            shutil.copyfile(source_folder / name, folder / name)


@contextmanager
def replacing(folder: str | Path) -> Iterator[Path]:
    """An empty folder to write into, which takes the place of `folder` when the block ends well. As `write` says."""
    folder = Path(folder).resolve()
    check_destination(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = folder.with_name(f".{folder.name}.new-{os.getpid()}")
    new.mkdir()
    try:
        yield new
        for path in (*new.iterdir(), new):
            _sync(path)
        _swap(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _weight_files(folder: Path) -> dict[str, set[str] | None]:
    """The weight files of a folder, each with the tensors the index says it holds (None: whatever it holds)."""
    if (folder / WEIGHTS).exists():
        return {WEIGHTS: None}
    if not (folder / INDEX).exists():
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        if pickled:
            raise CheckpointError(f"{folder}: {pickled[0]} is a pickle checkpoint, which is refused: use safetensors")
        raise CheckpointError(f"{folder} has neither {WEIGHTS} nor {INDEX}")
    try:
        weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        files: dict[str, set[str] | None] = {file: set() for file in weight_map.values()}
        for name, file in weight_map.items():
            files[file] = (files[file] or set()) | {name}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / INDEX} is no safetensors index: {error!r}") from error
    for file in files:
        if Path(file).name != file:
            raise CheckpointError(f"{folder / INDEX} names {file!r}, which is not a file of this folder")
        if not (folder / file).exists():
            raise CheckpointError(f"{folder / INDEX} names {file}, which is missing")
    return files


def _shapes(plan: WeightPlan) -> dict[str, tuple[int, ...]]:
    """HF shapes as the plan uses them: its targets together hold every parameter whole."""
    shapes: dict[str, tuple[int, ...]] = {}
    for copy in plan.copies:
        stops = tuple(stop for _, stop in copy.source.index)
        known = shapes.get(copy.source.name, stops)
        shapes[copy.source.name] = tuple(max(a, b) for a, b in zip(known, stops, strict=True))
    return shapes


def _check(folder: Path, files: dict[str, set[str] | None], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Which file holds which parameter, after proof that all are there, and nothing that is not modelled."""
    holder: dict[str, str] = {}
    for file, listed in files.items():
        with _opened(folder / file) as shard:
            held = set(shard.keys())
            for name in sorted(held if listed is None else listed):
                if name not in held:
                    raise CheckpointError(f"{folder / INDEX} says {file} holds {name}, but it does not")
                holder[name] = file
                if name not in shapes:
                    _check_extra(folder / file, name)
                    continue
                part = shard.get_slice(name)
                shape, dtype = tuple(part.get_shape()), part.get_dtype()
                if shape != shapes[name]:
                    raise CheckpointError(f"{folder / file}: {name} has shape {shape}, expected {shapes[name]}")
                if dtype not in _DTYPES:
                    raise CheckpointError(f"{folder / file}: {name} has dtype {dtype}, expected one of {_DTYPES}")
    for name in shapes:
        if name not in holder:
            raise CheckpointError(f"{folder} does not hold {name}")
    return holder


def _check_extra(path: Path, name: str) -> None:
    """Refuses a tensor that is no parameter of the model, except the two that HF itself ignores."""
    if name != "lm_head.weight" and not name.endswith(".rotary_emb.inv_freq"):
        raise CheckpointError(f"{path} holds {name}, which the model of config.json does not have")


def _opened(path: Path) -> safe_open:
    """An open safetensors file; the header is checked against the file's size."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged, truncated or not readable: {error}") from error


def _check_weights(weights: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> torch.dtype:
    """The one dtype of the weights, which must be exactly the model's parameters."""
    for name in sorted(weights.keys() ^ shapes.keys()):
        raise CheckpointError(f"{name} is {'missing' if name in shapes else 'no parameter of this model'}")
    for name, tensor in weights.items():
        if tuple(tensor.shape) != shapes[name]:
            raise CheckpointError(f"{name} has shape {tuple(tensor.shape)}, expected {shapes[name]}")
    dtypes = {tensor.dtype for tensor in weights.values()}
    if len(dtypes) != 1:
        raise CheckpointError(f"an export has one dtype, these tensors have {sorted(map(str, dtypes))}")
    return dtypes.pop()


def check_destination(folder: str | Path) -> None:
    """Raise CheckpointError where something lies at `folder` that is not an export: replacing would delete it."""
    folder = Path(folder)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / RECORD).is_file() or any(path.is_dir() for path in folder.iterdir()):
        raise CheckpointError(
            f"{folder} exists and is no export of this project (it has no {RECORD}): choose another place, or remove "
            "it yourself"
        )


def _write_weights(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    parameter: Callable[[str], Tensor],
    dtype: torch.dtype,
    max_shard_bytes: int | float,
) -> None:
    """One file, or several with their index if the weights are larger than `max_shard_bytes`."""
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    shards = list(_shards(sizes, max_shard_bytes))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / file, {name: shapes[name] for name in names}, parameter, dtype)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})


def _write_shard(
    path: Path, shapes: Mapping[str, tuple[int, ...]], parameter: Callable[[str], Tensor], dtype: torch.dtype
) -> None:
    """A safetensors file, tensor by tensor: the library's own writer wants all of them at once.

    Format: the header's length as 8 bytes, little endian; the header as JSON, padded with spaces to a multiple of 8;
    the tensors' bytes. https://huggingface.co/docs/safetensors
    """
    (name_of_dtype,) = (name for name, known in _TORCH_DTYPES.items() if known == dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": name_of_dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            tensor = parameter(name)
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise CheckpointError(f"{name}: expected {shape} of {dtype}, got {tuple(tensor.shape)} {tensor.dtype}")
            file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def _shards(sizes: Mapping[str, int], max_shard_bytes: int | float) -> Iterator[list[str]]:
    """Names in order, cut where the next tensor would no longer fit."""
    names: list[str] = []
    size = 0
    for name, num_bytes in sizes.items():
        if names and size + num_bytes > max_shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += num_bytes
    yield names


def write_json(path: Path, value: object) -> None:
    """Write a JSON file as all of an export are written: indented, keys sorted."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _swap(new: Path, folder: Path) -> None:
    """Puts `new` in the place of `folder`."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
