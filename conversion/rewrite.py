"""Writes a model's folder from another, compares two, and says what a conversion will do before it does it.

Parts of `PART_BYTES` move from mapped files to written ones, `THREADS` at a time; none is held for longer.
"""

import dataclasses
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conversion import folders, hf, torch_dist
from conversion.ends import End, HuggingFaceEnd, MegatronEnd, global_place, is_vocabulary, local_shapes, whole
from conversion.families import Model, contrast
from conversion.folders import ModelFolderError
from conversion.ledger import Ledger, check_record
from conversion.plan import Copy, WeightPlan, plan
from conversion.tiles import ParallelLayout, Span, Tile, share
from conversion.torch_dist import Index, Shape

Advance = Callable[[int], None]

PART_BYTES = 1 << 24  # the allocator gives blocks of this size again; above 32 MiB each would be new pages
# Beside the numbers of a chunk: its zip archive, its place in the index, the empty states of modules; 2.0 to 3.2 KB
# were measured. Of a model of many small experts that is as much as the numbers.
CHUNK_BYTES = 4096
THREADS = min(4, os.cpu_count() or 1)


class MismatchError(ValueError):
    """Two folders that do not hold the same weights; the message names the parameter and its first differing row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """What a conversion will do, each weight once: `reads` of which file, and how much it writes.

    `links` are the bytes from a file of the source to a rank of the target that will load them (replicas load the same
    ones), or to a file.
    """

    parameters: int
    copies: int
    num_bytes: int
    written_bytes: int  # tokenizer, vocabulary's padding and `CHUNK_BYTES` a chunk of a distributed checkpoint included
    peak_bytes: int
    reads: dict[str, int]
    links: dict[tuple[str, str], int]


def preview(end: End, layout: ParallelLayout | None) -> Preview:
    """Plan a conversion of `end` for ranks of `layout`, to Hugging Face if None; move nothing.

    ValueError if a size does not divide.
    """
    model, size = end.model, end.dtype.itemsize
    if layout is None:
        file_of = hf.shard_names(model.parameters(), end.dtype)
        files = list(dict.fromkeys(file_of.values()))
        tiles = [Tile(files.index(file_of[t.hf]), t.name, t.hf, t.rows, t.cols) for t in model.hf_tiles()]
    else:
        files, tiles = [f"rank {rank}" for rank in range(layout.world_size)], model.megatron_tiles(layout)
    moves: WeightPlan = plan(end.tiles(), tiles)
    links: Counter[tuple[str, str]] = Counter()
    for copy in moves.copies:
        links[end.files[copy.source.rank], files[copy.target.rank]] += copy.target.num_elements * size
    reads: Counter[str] = Counter()
    for tile in end.tiles():
        reads[end.files[tile.rank]] += math.prod(b - a for a, b in (tile.rows, tile.cols or (0, 1))) * size
    num_bytes = model.num_parameters() * size
    written_bytes = num_bytes if layout is None else _written_bytes(model, layout, end.dtype)
    return Preview(
        parameters=model.num_parameters(),
        copies=len(moves.copies),
        num_bytes=num_bytes,
        written_bytes=written_bytes + folders.companion_bytes(end.companions),
        peak_bytes=min(5 * THREADS * PART_BYTES, 3 * num_bytes),  # measured: tests/benchmarks/convert.py
        reads=dict(reads),
        links=dict(links),
    )


def _written_bytes(model: Model, layout: ParallelLayout, dtype: torch.dtype) -> int:
    """Bytes of a distributed checkpoint, an upper bound: its numbers, and what each chunk costs beside them."""
    parts = [index for cut in chunks(model, layout, dtype).values() for index in cut]
    numbers = sum(math.prod(stop - start for start, stop in index) for index in parts)
    return dtype.itemsize * numbers + CHUNK_BYTES * len(parts)


def write_hf(end: End, folder: str | Path, advance: Advance = lambda _: None, part_bytes: int = PART_BYTES) -> None:
    """Write the Hugging Face folder of what `end` holds; `advance` hears of each of `hf_parts`, written and read back.

    ModelFolderError, and no folder, if a weight is not finite, is not what the source's conversion.json says, or if the
    files, opened again, hold a part in a wrong place.
    """
    folders.check_apart(folder, end.path)
    check_record(end)
    ledger = Ledger(end)
    with hf.writing(folder, end.companions, end.dtype) as export:

        def move(part: tuple[str, Span]) -> None:
            name, rows = part
            values = ledger.read(name, rows)
            if not ledger.bad:
                export.write(name, rows[0], values)

        _each(move, hf_parts(end.model, end.dtype, part_bytes), advance)
        ledger.check()
        _check_written(HuggingFaceEnd(export.folder), end, advance)
        export.record |= ledger.record()


def hf_parts(model: Model, dtype: torch.dtype, part_bytes: int = PART_BYTES) -> list[tuple[str, Span]]:
    """Return the parts of HF parameters that are moved at once: their names and rows."""
    shapes = model.parameters()
    return [(name, rows) for name in shapes for rows in _slabs(shapes[name], (0, shapes[name][0]), dtype, part_bytes)]


def write_megatron(
    end: End,
    folder: str | Path,
    layout: ParallelLayout,
    advance: Advance = lambda _: None,
    part_bytes: int = PART_BYTES,
) -> None:
    """Write the distributed checkpoint of what `end` holds, cut for ranks of `layout`.

    Any layout can load it: the cut only spares ranks of this one from reading what they do not need, and sets the
    padding of the vocabulary. Configuration and tokenizer lie beside, so that it can be read back. ModelFolderError as
    in `write_hf`; `advance` hears of each of `chunks`, and of `hf_parts` that are read back.
    """
    model = end.model
    model.megatron_tiles(layout)  # a size that does not divide is refused here
    folders.check_apart(folder, end.path)
    check_record(end)
    ledger = Ledger(end)
    source = _Assembled(end, model, ledger, advance)
    num_bytes = _written_bytes(model, layout, end.dtype) + folders.companion_bytes(end.companions)
    with folders.replacing(folder, num_bytes) as new:
        folders.copy_companions(end.companions, new)
        torch_dist.write(
            new, chunks(model, layout, end.dtype, part_bytes), source.read, end.dtype, _objects(model), THREADS
        )
        ledger.check()
        folders.write_json(new / "config.json", model.config)
        _check_written(MegatronEnd(new), end, advance)
        folders.write_json(new / folders.RECORD, ledger.record() | {"layout": dataclasses.asdict(layout)})


def chunks(
    model: Model, layout: ParallelLayout, dtype: torch.dtype, part_bytes: int = PART_BYTES
) -> dict[str, list[Index]]:
    """Return the parts that every tensor of a checkpoint is cut into, so that a rank of `layout` reads few others."""
    cuts: dict[str, list[Index]] = {}
    local = model.megatron_shapes(ParallelLayout(tensor=layout.tensor, fused_norms=True), 0)
    for name, shape in local_shapes(model).items():
        stored, planes = global_place(name)
        if is_vocabulary(name):
            shape = (model.padded_vocab_size(layout), *shape[1:])
        for rows, *columns in _cut(name, shape, local[name], layout.tensor):
            for slab in _slabs(shape, rows, dtype, part_bytes):
                cuts.setdefault(stored, []).append((*((plane, plane + 1) for plane in planes), slab, *columns))
    return cuts


def _cut(name: str, shape: Shape, local: Shape, tensor: int) -> list[tuple[Span, ...]]:
    """Equal parts of the dimension that tensor ranks split; of a fused [gate | up], each half in as many."""
    everything = tuple((0, n) for n in shape)
    split = next((d for d, n in enumerate(shape) if local[d] != n), None)
    if split is None:
        return [everything]
    parts = 2 * tensor if name.endswith("linear_fc1.weight") else tensor
    return [(*everything[:split], share(shape[split], parts, i), *everything[split + 1 :]) for i in range(parts)]


def _slabs(shape: Shape, rows: Span, dtype: torch.dtype, part_bytes: int = PART_BYTES) -> Iterator[Span]:
    """`rows` of a tensor, cut so that none with all its columns is above `part_bytes` (but one row is never cut)."""
    height = max(1, part_bytes // (math.prod(shape[1:]) * dtype.itemsize))
    for start in range(*rows, height):
        yield start, min(start + height, rows[1])


def _each(move: Callable[[Any], object], parts: Iterable[Any], advance: Advance) -> None:
    """Move all parts, `THREADS` at a time, and tell `advance` of each; the first error in their order."""
    with ThreadPoolExecutor(THREADS) as threads:
        for moving in [threads.submit(move, part) for part in parts]:
            try:
                moving.result()
                advance(1)
            except BaseException:
                threads.shutdown(cancel_futures=True)
                raise


def read_through(end: End, advance: Advance = lambda _: None) -> Ledger:
    """Return what a folder holds, digests and NaN; `advance` hears of each of `hf_parts`."""
    ledger = Ledger(end)
    _each(lambda part: ledger.read(*part), hf_parts(end.model, end.dtype), advance)
    return ledger


def _check_written(end: End, source: End, advance: Advance) -> None:
    """Refuses files that do not hold what the source does: they are opened and read as anybody would.

    Of each part its beginning and its end, an eighth: that shows what is in a wrong place. To compare every bit takes
    as long as to write it, and is what `compare` is for. The disk takes the files in meanwhile.
    """
    shapes = end.model.parameters()

    def check(part: tuple[str, Span]) -> None:
        name, rows = part
        slabs = list(_slabs(shapes[name], rows, end.dtype, PART_BYTES // 16))
        for start, stop in dict.fromkeys((slabs[0], slabs[-1])):
            if not _equal_bits(end.rows(name, start, stop), source.rows(name, start, stop)):
                raise ModelFolderError(
                    f"{end.path}: {name}, somewhere in rows {start} to {stop}, is not written as it was read from "
                    f"{source.path}; nothing is kept: try again, on another disk or machine"
                )

    with ThreadPoolExecutor(1) as beside:
        syncing = beside.submit(folders.sync, end.path)
        _each(check, hf_parts(end.model, end.dtype), advance)
        syncing.result()


class _Assembled:
    """Parts of a checkpoint's tensors, put together from HF parameters."""

    def __init__(self, end: End, model: Model, ledger: Ledger, advance: Advance) -> None:
        self._end, self._ledger, self._advance, self._lock = end, ledger, advance, Lock()
        self._local = {global_place(name): name for name in local_shapes(model)}
        self._copies: dict[str, list[Copy]] = {}
        for copy in plan(model.hf_tiles(), model.megatron_tiles(whole())).copies:
            self._copies.setdefault(copy.target.name, []).append(copy)

    def read(self, stored: str, index: Index) -> Tensor:
        """One part, zero where it is padding."""
        name, part = self._place(stored, index)
        shape, size = [stop - start for start, stop in index], [stop - start for start, stop in part]
        out, filled = torch.empty(size, dtype=self._end.dtype), 0
        for copy in self._copies[name]:
            in_tensor = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(part, copy.target.index, strict=True)]
            if any(start >= stop for start, stop in in_tensor):
                continue
            in_out = [slice(a - c, b - c) for (a, b), (c, _) in zip(in_tensor, part, strict=True)]
            moved = zip(in_tensor, copy.target.index, copy.source.index, strict=True)
            in_parameter = [(a - c + e, b - c + e) for (a, b), (c, _), (e, _) in moved]
            (r0, r1), *columns = in_parameter
            values = self._end.rows(copy.source.name, r0, r1)[(slice(None), *(slice(*span) for span in columns))]
            c0, c1 = columns[0] if columns else (0, 1)
            self._ledger.enter(copy.source.name, (r0, r1, c0, c1), values)
            if values.numel() == out.numel() and values.is_contiguous():
                out = values
            else:
                out[tuple(in_out)] = values
            filled += values.numel()
        if filled < out.numel():  # the vocabulary's padding is at the end
            out[filled // max(1, math.prod(size[1:])) :] = 0
        with self._lock:  # any thread reads
            self._advance(1)
        return out.reshape(shape)

    def _place(self, stored: str, index: Index) -> tuple[str, Index]:
        for planes in range(len(index)):
            name = self._local.get((stored, tuple(start for start, _ in index[:planes])))
            if name is not None:
                return name, index[planes:]
        raise ValueError(f"no parameter lies at {index} of {stored}")


def compare(a: End, b: End, advance: Advance = lambda _: None) -> None:
    """Raise MismatchError unless both compute alike and hold the same values; `advance` hears of each parameter.

    Of the same type, bit by bit; of others as numbers: bfloat16 equals itself in float32, and NaN equals NaN.
    """
    if difference := contrast(a.model.computation(), b.model.computation()):
        raise MismatchError(f"{a.path} and {b.path} compute differently, by their config.json: {difference}")
    if a.model.parameters() != b.model.parameters():
        names = sorted(a.model.parameters().items() ^ b.model.parameters().items())
        raise MismatchError(f"{a.path} and {b.path} hold different models: {names[0][0]} differs in name or shape")
    wider = max(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    for name, shape in a.model.parameters().items():
        for start, stop in _slabs(shape, (0, shape[0]), wider):
            if not bool(_same(*(end.rows(name, start, stop) for end in (a, b))).all()):
                raise _mismatch(a, b, name, shape, wider)
        advance(1)


def _same(left: Tensor, right: Tensor) -> Tensor:
    """Which elements are equal; of the same type one truth for all, if all are."""
    if left.dtype == right.dtype:
        if _equal_bits(left, right):
            return torch.tensor(True)
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[left.element_size()]
        return left.view(bits) == right.view(bits)
    left, right = left.double(), right.double()
    return (left == right) | (left.isnan() & right.isnan())


def _equal_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors of one type and shape are the same; eight bytes at a time, torch takes an element."""
    a, b = (values.contiguous().view(-1).view(torch.uint8).numpy() for values in (left, right))
    middle = len(a) // 8 * 8
    eights = np.array_equal(a[:middle].view(np.int64), b[:middle].view(np.int64))
    return eights and np.array_equal(a[middle:], b[middle:])


def _mismatch(a: End, b: End, name: str, shape: Shape, wider: torch.dtype) -> MismatchError:
    """The error for a parameter that is known to differ: where first, and in how many values."""
    first, differing, rounded = None, 0, a.dtype != b.dtype
    narrow = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    for start, stop in _slabs(shape, (0, shape[0]), wider):
        left, right = (end.rows(name, start, stop) for end in (a, b))
        wrong = ~_same(left, right).expand(left.shape)
        differing += int(wrong.sum())
        rounded = rounded and bool(_same(left.to(narrow), right.to(narrow)).all())
        if first is None and bool(wrong.any()):
            place = wrong.nonzero()[0].tolist()
            values = " and ".join(
                f"{float(side[tuple(place)])!r} in {end.path}" for side, end in ((left, a), (right, b))
            )
            first = f"row {start + place[0]}, column {place[1] if place[1:] else 0}: {values}"
    hint = f"; they are equal once rounded to {str(narrow).removeprefix('torch.')}" if rounded else ""
    return MismatchError(f"{name}, {first}; {differing} of {math.prod(shape)} values of this parameter differ{hint}")


def _objects(model: Model) -> dict[str, object]:
    """What Megatron looks for beside tensors: the state of each linear module, which is empty, and what is common."""
    objects: dict[str, object] = {"common_state/shard_0_1": [{}]}
    for name in local_shapes(model):
        stored, planes = global_place(name)
        module, _, kind = stored.rpartition(".")
        if kind == "weight" and ".linear_" in stored:
            place, of = (
                ".".join(map(str, n)) for n in (planes, (model.num_layers, model.dims.num_experts)[: len(planes)])
            )
            objects[f"{module}._extra_state/shard_{place}_{of}"] = [None]
    return objects
