"""HF folders as the source and the target of plans: safetensors in, safetensors out.

`load` reads only the rectangles a rank holds, shard by shard. `writing` makes a folder that transformers and vLLM open,
filled as the weights arrive; it appears as a whole or not at all, and carries a conversion.json with the digests of
what it holds. Pickle checkpoints are refused: opening one runs whatever code it holds.
"""

import json
import logging
import math
import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from conversion.families import read_model
from conversion.folders import (
    RECORD,
    ModelFolderError,
    companion_bytes,
    copy_companions,
    model_name,
    replacing,
    write_json,
)
from conversion.mapping import PiecewiseFile, mapped
from conversion.plan import WeightPlan
from conversion.transfer.pieces import view
from conversion.verify import DIGEST_RULE, tensor_digests
from conversion.weight_files import INDEX, WEIGHTS, weight_files

MAX_SHARD_BYTES = 5e9
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_IGNORED = ".rotary_emb.inv_freq"  # by transformers, as a tied head is
_STACKS = (".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")
_FUSED = (
    "all experts of a layer in one tensor, which is not read: save the model without save_original_format=False; one "
    "that transformers opened from such a folder, from a copy by from_config and load_state_dict"
)
_ROWS = 1024  # of a tied head, compared at once

_LOG = logging.getLogger(__name__)
_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """Where a parameter lies: from byte `offset` of a safetensors file on, row after row."""

    file: str
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def check(folder: str | Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Stored]:
    """Return where each parameter lies. ModelFolderError unless the folder holds exactly `shapes`.

    Reads headers, and no weights but those of a tied head that is stored beside the embedding. Says that an adapter
    beside them is left out.
    """
    folder = Path(folder)
    parameters = _check(folder, weight_files(folder), shapes)
    if adapters := [name for name in _ADAPTERS if (folder / name).exists()]:
        _say_left_out(folder, " and ".join(adapters))
    return {name: place for name, place in parameters.items() if name in shapes}


@cache
def _say_left_out(folder: Path, adapters: str) -> None:
    """Once a process, however often the folder is checked."""
    _LOG.warning("%s: %s: left out; merge the adapter into the weights if it belongs to the model", folder, adapters)


def check_one_type(folder: Path, parameters: Mapping[str, Stored]) -> None:
    """Raise ModelFolderError where the parameters of a folder are of several types."""
    of_type = {place.dtype: name for name, place in sorted(parameters.items(), reverse=True)}
    if len(of_type) != 1:
        mix = ", ".join(sorted(f"{str(dtype).removeprefix('torch.')} ({name})" for dtype, name in of_type.items()))
        raise ModelFolderError(f"{folder} mixes types: {mix}; convert it to one first, for example with transformers")


def rows(folder: Path, place: Stored, start: int = 0, stop: int | None = None) -> Tensor:
    """Return rows of a parameter, mapped from its file as stored; from any thread. ModelFolderError if damaged."""
    count = (place.shape[0] if stop is None else stop) - start
    row_bytes = math.prod(place.shape[1:]) * place.dtype.itemsize
    path = folder / place.file
    try:
        return mapped(path, place.offset + start * row_bytes, (count, *place.shape[1:]), place.dtype)
    except (OSError, EOFError) as error:
        raise ModelFolderError(f"{path} is damaged, truncated or not readable: {error}") from error


@torch.no_grad()
def load(folder: str | Path, plan: WeightPlan, rank: int, tensors: Mapping[str, Tensor]) -> None:
    """Fills the local tensors of target rank `rank` from an HF folder, cast to their dtype.

    `plan` goes from `Model.hf_tiles()` to the layout of the tensors. Local: each rank reads for itself. The folder is
    checked whole, against all the parameters of the plan, before the first tensor is written.
    """
    folder = Path(folder)
    parameters = _check(folder, weight_files(folder), _shapes(plan))
    for copy in plan.to_rank(rank):
        (start, stop), *columns = copy.source.index
        piece = rows(folder, parameters[copy.source.name], start, stop)
        view(tensors, copy.target).copy_(piece[(slice(None), *(slice(*span) for span in columns))])


@dataclass
class Export:
    """A folder being written: `tensors` are its parameters, mapped from its files, and `record` its conversion.json.

    To write rows with `write` fills the same places; it leaves no pages of them in this process.
    """

    folder: Path
    tensors: dict[str, Tensor]
    record: dict[str, Any]
    places: dict[str, Stored]
    _writing: Lock = field(default_factory=Lock)

    def write(self, name: str, row: int, values: Tensor) -> None:
        """Write rows of a parameter, from `row` on; from any thread. OSError."""
        place = self.places[name]
        row_bytes = math.prod(place.shape[1:]) * place.dtype.itemsize
        # One at a time: Linux has a lock a file too, and who waits for that one keeps a core busy.
        with self._writing, PiecewiseFile(self.folder / place.file, "r+b") as file:
            file.seek(place.offset + row * row_bytes)
            file.write(values.contiguous().view(-1).view(torch.uint8).numpy())


@contextmanager
def writing(
    folder: str | Path, source_folder: str | Path, dtype: torch.dtype, max_shard_bytes: int | float = MAX_SHARD_BYTES
) -> Iterator[Export]:
    """A new HF folder with the configuration and tokenizer of `source_folder`, to be filled inside the `with`.

    What is written into the export's tensors goes to the files' pages, which the kernel writes out as it likes: a model
    larger than memory can be filled. The dtype goes into config.json, for readers cast to what it says, under the names
    that the source has for it (older readers know `torch_dtype` alone), and at the end the digests of what the files
    hold into conversion.json, unless the record has them. It takes the place of what is there as `folders.replacing`
    says.
    """
    source_folder = Path(source_folder)
    model = read_model(source_folder)
    name_of_dtype = str(dtype).removeprefix("torch.")
    with replacing(folder, companion_bytes(source_folder)) as new:
        copy_companions(source_folder, new)
        tensors = _mapped_weights(new, model.parameters(), dtype, max_shard_bytes)
        keys = [key for key in ("dtype", "torch_dtype") if key in model.config] or ["dtype"]
        write_json(new / "config.json", dict(model.config) | dict.fromkeys(keys, name_of_dtype))
        record = {"source": model_name(source_folder), "dtype": name_of_dtype, "config": model.computation()}
        export = Export(new, tensors, record | {"digest_rule": DIGEST_RULE}, check(new, model.parameters()))
        yield export
        export.record.setdefault("logprobs", {"max_difference": None, "reason": "nobody has compared them yet"})
        if "digests" not in export.record:
            export.record["digests"] = tensor_digests(tensors)
        write_json(new / RECORD, export.record)


def _shapes(plan: WeightPlan) -> dict[str, tuple[int, ...]]:
    """HF shapes as the plan uses them: its targets together hold every parameter whole."""
    shapes: dict[str, tuple[int, ...]] = {}
    for copy in plan.copies:
        stops = tuple(stop for _, stop in copy.source.index)
        known = shapes.get(copy.source.name, stops)
        shapes[copy.source.name] = tuple(max(a, b) for a, b in zip(known, stops, strict=True))
    return shapes


def _check(folder: Path, files: dict[str, set[str] | None], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Stored]:
    """Where each parameter lies, after proof that all are there, and nothing that is not modelled."""
    parameters: dict[str, Stored] = {}
    for file, listed in files.items():
        tensors, start = _header(folder / file)
        for name in sorted(tensors.keys() | (listed or set())):
            if name not in tensors:
                raise ModelFolderError(f"{folder / INDEX} says {file} holds {name}, but it does not")
            if listed is not None and name not in listed and name in shapes:
                raise ModelFolderError(
                    f"{folder / file} holds a {name} that {INDEX} does not place there, while vLLM would load it: "
                    "remove the tensor or mend the index; transformers writes both anew"
                )
            if name not in shapes and name != HEAD and not name.endswith(_IGNORED):
                why = "which the model of config.json does not have: take both from the same model"
                raise ModelFolderError(f"{folder / file} holds {name}, {_FUSED if name.endswith(_STACKS) else why}")
            shape, dtype = tuple(tensors[name]["shape"]), tensors[name]["dtype"]
            if shape != shapes.get(name, shape):
                raise ModelFolderError(
                    f"{folder / file}: {name} has shape {shape}, expected {shapes[name]} by config.json: take both "
                    "from the same model"
                )
            if dtype in _DTYPES:
                offset = start + tensors[name]["data_offsets"][0]
                parameters[name] = Stored(file=file, offset=offset, shape=shape, dtype=_DTYPES[dtype])
            elif name in shapes or name == HEAD:
                raise ModelFolderError(
                    f"{folder / file}: {name} has dtype {dtype}, expected one of {tuple(_DTYPES)}: "
                    "convert it, for example with transformers"
                )
    if HEAD in parameters and HEAD not in shapes and EMBEDDING not in parameters:
        raise ModelFolderError(
            f"{folder} holds the tied {EMBEDDING} under the name {HEAD} alone, which is not read: open the folder with "
            "transformers, and save it with save_pretrained"
        )
    for name in shapes:
        if name not in parameters:
            raise ModelFolderError(f"{folder} does not hold {name}: take weights and config.json from the same model")
    if HEAD in parameters and HEAD not in shapes:
        _check_tied(folder, parameters[EMBEDDING], parameters[HEAD])
    return parameters


def _check_tied(folder: Path, embedding: Stored, head: Stored) -> None:
    """Refuses a stored head that is not the embedding: who ties and who reads it would compute different models."""
    same = (embedding.shape, embedding.dtype) == (head.shape, head.dtype)
    for start in range(0, embedding.shape[0] if same else 0, _ROWS):
        stop = min(start + _ROWS, embedding.shape[0])
        pair = (rows(folder, place, start, stop).view(torch.uint8) for place in (embedding, head))
        same = same and torch.equal(*pair)
    if not same:
        raise ModelFolderError(
            f"{folder / head.file} holds a {HEAD} that is not {EMBEDDING}, but config.json ties them: set "
            "tie_word_embeddings to false if the model has a head of its own, else remove the tensor"
        )


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The tensors that the header of a safetensors file names, and where their bytes begin. ModelFolderError: damaged.

    safetensors checks the header against the file's size, but gives no offsets.
    """
    try:
        with path.open("rb") as file, safe_open(path, framework="pt"):
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError) as error:
        raise ModelFolderError(f"{path} is damaged, truncated or not readable: {error}; copy it again") from error
    header.pop("__metadata__", None)
    return header, 8 + length


def _mapped_weights(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, max_shard_bytes: int | float
) -> dict[str, Tensor]:
    """The tensors of new files: one, or several with their index if the weights are larger than `max_shard_bytes`."""
    tensors: dict[str, Tensor] = {}
    weight_map = shard_names(shapes, dtype, max_shard_bytes)
    for file in dict.fromkeys(weight_map.values()):
        file_shapes = {name: shape for name, shape in shapes.items() if weight_map[name] == file}
        tensors |= _mapped_file(folder / file, file_shapes, dtype)
    if set(weight_map.values()) != {WEIGHTS}:
        total = sum(tensor.nbytes for tensor in tensors.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return tensors


def _mapped_file(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
    """A new safetensors file (its length of header, header, bytes) and its tensors. OSError where there is no room."""
    names = {dtype: name for name, dtype in _DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("x+b") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.flush()
        try:
            # Without the reservation a full disk shows as a SIGBUS when a tensor is written.
            os.posix_fallocate(file.fileno(), 0, 8 + len(text) + end)
        except OSError as error:
            raise OSError(error.errno, f"no room for the {end} bytes of {path.name}: {error.strerror}") from error
        whole = torch.frombuffer(mmap.mmap(file.fileno(), 8 + len(text) + end), dtype=torch.uint8)
    data = whole[8 + len(text) :]
    return {name: data[slice(*header[name]["data_offsets"])].view(dtype).view(shape) for name, shape in shapes.items()}


def shard_names(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, max_shard_bytes: int | float = MAX_SHARD_BYTES
) -> dict[str, str]:
    """Return the file of each parameter in a folder that is written."""
    shards = list(_shards(shapes, dtype.itemsize, max_shard_bytes))
    return {
        name: WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number, names in enumerate(shards, 1)
        for name in names
    }


def _shards(shapes: Mapping[str, tuple[int, ...]], itemsize: int, max_shard_bytes: int | float) -> Iterator[list[str]]:
    """Names in order, cut where the next tensor would no longer fit."""
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        num_bytes = math.prod(shape) * itemsize
        if names and size + num_bytes > max_shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += num_bytes
    yield names
