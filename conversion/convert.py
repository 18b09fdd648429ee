"""Writes a model's folder from another, compares two, and says what a conversion will do before it does it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conversion import checkpoint, folders, hf
from conversion.checkpoint import Index, Shape
from conversion.ends import HELD, End, global_place, is_vocabulary, local_shapes, whole
from conversion.families import Model
from conversion.plan import Copy, plan
from conversion.tiles import ParallelLayout, Span, share

Advance = Callable[[int], None]


class MismatchError(ValueError):
    """Two folders that do not hold the same weights; the message names the parameter and its first differing row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """What a conversion will do. `rank_bytes` are the least and the most a rank of the layout holds of the weights."""

    parameters: int
    copies: int
    num_bytes: int
    peak_bytes: int
    rank_bytes: tuple[int, int]


def preview(end: End, layout: ParallelLayout) -> Preview:
    """Plan a conversion of `end` for ranks of `layout`, move nothing. ValueError if a size does not divide."""
    model, size = end.model, end.dtype.itemsize
    tiles = model.megatron_tiles(layout)
    held = [0] * layout.world_size
    for tile in tiles:
        columns = 1 if tile.cols is None else tile.cols[1] - tile.cols[0]
        held[tile.rank] += (tile.rows[1] - tile.rows[0]) * columns * size
    largest = max(math.prod(shape) for shape in model.parameters().values()) * size
    return Preview(
        parameters=model.num_parameters(),
        copies=len(plan(model.hf_tiles(), tiles).copies),
        num_bytes=model.num_parameters() * size,
        peak_bytes=(HELD + 1) * largest,
        rank_bytes=(min(held), max(held)),
    )


def write_hf(end: End, folder: str | Path, advance: Advance = lambda _: None) -> None:
    """Write the Hugging Face folder of what `end` holds, one parameter at a time; `advance` hears of each."""

    with hf.writing(folder, end.companions, end.dtype) as export:
        export.record |= _record(end)
        for name, tensor in export.tensors.items():
            tensor.copy_(end.parameter(name))
            advance(1)


def write_megatron(end: End, folder: str | Path, layout: ParallelLayout, advance: Advance = lambda _: None) -> None:
    """Write the distributed checkpoint of what `end` holds, cut for ranks of `layout`; `advance` hears of each part.

    Any layout can load it: the cut only spares ranks of this one from reading what they do not need, and sets the
    padding of the vocabulary. Configuration and tokenizer lie beside, so that it can be read back.
    """
    model = end.model
    model.megatron_tiles(layout)  # a size that does not divide is refused here
    source = _Assembled(end, model, advance)
    with folders.replacing(folder) as new:
        checkpoint.write(new, chunks(model, layout), source.read, end.dtype, _objects(model))
        folders.write_json(new / "config.json", model.config)
        folders.copy_companions(end.companions, new)
        folders.write_json(new / folders.RECORD, _record(end) | {"layout": {"tensor": layout.tensor}})


def chunks(model: Model, layout: ParallelLayout) -> dict[str, list[Index]]:
    """Return the parts that every tensor of a checkpoint is cut into, so that a rank of `layout` reads few others."""
    found: dict[str, list[Index]] = {}
    local = model.megatron_shapes(ParallelLayout(tensor=layout.tensor, fused_norms=True), 0)
    for name, shape in local_shapes(model).items():
        stored, planes = global_place(name)
        if is_vocabulary(name):
            shape = (model.padded_vocab_size(layout), *shape[1:])
        for part in _cut(name, shape, local[name], layout.tensor):
            found.setdefault(stored, []).append((*((plane, plane + 1) for plane in planes), *part))
    return found


def _cut(name: str, shape: Shape, local: Shape, tensor: int) -> list[tuple[Span, ...]]:
    """Equal parts of the dimension that tensor ranks split; of a fused [gate | up], each half in as many."""
    everything = tuple((0, n) for n in shape)
    split = next((d for d, n in enumerate(shape) if local[d] != n), None)
    if split is None:
        return [everything]
    parts = 2 * tensor if name.endswith("linear_fc1.weight") else tensor
    return [(*everything[:split], share(shape[split], parts, i), *everything[split + 1 :]) for i in range(parts)]


class _Assembled:
    """Parts of a checkpoint's tensors, put together from HF parameters."""

    def __init__(self, end: End, model: Model, advance: Advance) -> None:
        self._end, self._advance = end, advance
        self._local = {global_place(name): name for name in local_shapes(model)}
        self._copies: dict[str, list[Copy]] = {}
        for copy in plan(model.hf_tiles(), model.megatron_tiles(whole())).copies:
            self._copies.setdefault(copy.target.name, []).append(copy)

    def read(self, stored: str, index: Index) -> Tensor:
        """One part, zero where it is padding."""
        self._advance(1)
        name, part = self._place(stored, index)
        out = torch.zeros([stop - start for start, stop in part], dtype=self._end.dtype)
        for copy in self._copies[name]:
            common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(part, copy.target.index, strict=True)]
            if all(start < stop for start, stop in common):
                there = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(common, part, strict=True))
                moved = zip(common, copy.target.index, copy.source.index, strict=True)
                here = tuple(slice(a - c + e, b - c + e) for (a, b), (c, _), (e, _) in moved)
                out[there] = self._end.parameter(copy.source.name)[here]
        return out.reshape([stop - start for start, stop in index])

    def _place(self, stored: str, index: Index) -> tuple[str, Index]:
        for planes in range(len(index)):
            name = self._local.get((stored, tuple(start for start, _ in index[:planes])))
            if name is not None:
                return name, index[planes:]
        raise ValueError(f"no parameter lies at {index} of {stored}")


def compare(a: End, b: End, advance: Advance = lambda _: None) -> None:
    """Raise MismatchError unless both hold the same values, as numbers: bfloat16 equals itself in float32."""
    if a.model.parameters() != b.model.parameters():
        names = sorted(a.model.parameters().items() ^ b.model.parameters().items())
        raise MismatchError(f"{a.path} and {b.path} hold different models: {names[0][0]} differs in name or shape")
    for name in a.model.parameters():
        one, other = a.parameter(name), b.parameter(name)
        advance(1)
        if torch.equal(one, other.to(one.dtype)) and torch.equal(other, one.to(other.dtype)):
            continue
        one, other = one.double(), other.double()
        same = (one == other) | (one.isnan() & other.isnan())
        if not bool(same.all()):
            row = int((~same.reshape(len(same), -1).all(dim=1)).nonzero()[0])
            column = int((~same[row]).reshape(-1).nonzero()[0])
            values = (float(side[row].reshape(-1)[column]) for side in (one, other))
            raise MismatchError(
                f"{name}, row {row}, column {column}: {next(values)!r} in {a.path}, {next(values)!r} in {b.path}; "
                f"{int((~same).sum())} of {same.numel()} values of this parameter differ"
            )


def _record(end: End) -> dict[str, Any]:
    return {"source": end.path.name, "source_kind": end.kind, "dtype": str(end.dtype).removeprefix("torch.")}


def _objects(model: Model) -> dict[str, object]:
    """What Megatron looks for beside tensors: the state of each linear module, which is empty, and what is common."""
    objects: dict[str, object] = {"common_state/shard_0_1": [{}]}
    for name in local_shapes(model):
        stored, planes = global_place(name)
        module, _, kind = stored.rpartition(".")
        if kind == "weight" and ".linear_" in stored and len(planes) == 1:
            objects[f"{module}._extra_state/shard_{planes[0]}_{model.num_layers}"] = [None]
    return objects
