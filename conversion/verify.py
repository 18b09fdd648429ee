"""Digests of what each end holds, so that two ends of a plan can be compared without moving the weights again.

A row of an HF parameter, in the wire's dtype, is read as words of 32 bits: two columns of bfloat16, one of float32. The
digest of a rectangle x, what lies outside of it being zero, is

    digest = sum over rows r of n[r] * row[r],    row[r] = sum over words w of m[w] * word(x[r], w)    (mod 2^64)

m and n are fixed odd pseudo-random 64-bit numbers of the word and the row in the whole HF parameter. Odd, so that one
changed element always changes it; of the position, so that swapped rows, columns or parts do. It is linear: digests of
shards add up to that of the whole, in any layout. It finds accidents, not an adversary.

Each end digests its own tensors, never what lay on the wire, and finds the rectangles through its own side of the plan.
Every element counts, every time: SmolLM2-135M's 269 MB take a core less than a tenth of a second.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from conversion.plan import Piece, Rectangle, WeightMismatch, WeightPlan
from conversion.transfer.pieces import view

DIGEST_RULE = "words of 32 bits"  # what follows, by name
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # sign-extended, the same at both ends
_WORD_BYTES = 4  # an element that is larger is a word
_CHUNK_WORDS = 1 << 18  # 1 MiB: stays in a core's cache
_COLUMN_SEED, _ROW_SEED = 0x243F6A8885A308D3, 0x13198A2E03707344
_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a local tensor and the rectangle of the HF parameter that it holds."""

    piece: Piece
    hf: str
    rectangle: Rectangle


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a publish carries: for each rectangle of each HF parameter its digest.

    `of_targets` are those of the parts of each target rank, in the plan's order.
    """

    version: int
    digests: Mapping[tuple[str, Rectangle], int]
    of_targets: Mapping[int, Sequence[int]]

    def digests_by_name(self) -> dict[str, str]:
        """HF name -> digest of the whole tensor, as `tensor_digests` has it; of rectangles that do not overlap."""
        digests: defaultdict[str, int] = defaultdict(int)
        for (hf, _), digest in self.digests.items():
            digests[hf] += digest
        return {hf: _hex(digest) for hf, digest in digests.items()}


def sent_parts(plan: WeightPlan, rank: int) -> tuple[Part, ...]:
    """What source rank `rank` sends: each distinct piece once, in the plan's order."""
    return tuple(dict.fromkeys(Part(copy.source, copy.hf, copy.rectangle) for copy in plan.from_rank(rank)))


def held_parts(plan: WeightPlan, rank: int) -> tuple[Part, ...]:
    """What target rank `rank` must hold afterwards, in the plan's order."""
    return tuple(Part(copy.target, copy.hf, copy.rectangle) for copy in plan.to_rank(rank))


class Verifier:
    """Compares what the target ranks of a plan hold with what its source ranks sent. Plans once."""

    def __init__(self, plan: WeightPlan) -> None:
        self._origins = {copy.target: copy for copy in plan.copies}
        sources = dict.fromkeys(copy.source.rank for copy in plan.copies)
        targets = dict.fromkeys(copy.target.rank for copy in plan.copies)
        self._sent = {rank: sent_parts(plan, rank) for rank in sources}
        self.target_parts = {rank: held_parts(plan, rank) for rank in targets}
        self._sent_keys, self._held_keys = (
            {rank: [(part.hf, part.rectangle) for part in parts] for rank, parts in end.items()}
            for end in (self._sent, self.target_parts)
        )

    @property
    def senders(self) -> list[int]:
        """The source ranks that have something to send."""
        return sorted(self._sent)

    def manifest(self, version: int, sent: Mapping[int, Sequence[int]]) -> Manifest:
        """The manifest, from the digests of each sender, by rank."""
        digests: dict[tuple[str, Rectangle], int] = {}
        for rank, keys in self._sent_keys.items():
            digests.update(zip(keys, sent[rank], strict=True))
        of_targets = {rank: [digests[key] for key in keys] for rank, keys in self._held_keys.items()}
        return Manifest(version=version, digests=digests, of_targets=of_targets)

    def first_mismatch(self, expected: Manifest, rank: int, digests: Sequence[int]) -> int | None:
        """The index of target rank `rank`'s first part of which the digest is not the manifest's; None if all are."""
        if digests == expected.of_targets[rank]:  # at once: there may be a thousand engines
            return None
        pairs = zip(expected.of_targets[rank], digests, strict=True)
        return next((index for index, (wanted, digest) in enumerate(pairs) if wanted != digest), None)

    def origin(self, rank: int, index: int) -> tuple[int, int]:
        """(source rank, index among its parts) of what a target's part was filled from."""
        copy = self._origins[self.target_parts[rank][index].piece]
        return copy.source.rank, self._sent[copy.source.rank].index(Part(copy.source, copy.hf, copy.rectangle))


class Holdings:
    """The parts that one rank holds, ready to be digested again and again. Local.

    `tensors` must stay the ones the rank computes with; their values are read at each call, cast to `dtype`.
    """

    def __init__(self, parts: Sequence[Part], tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self.parts = tuple(parts)
        self._dtype = dtype
        self._views = [_as_rows(view(tensors, part.piece), part) for part in parts]

    @torch.no_grad()
    def digests(self) -> list[int]:
        """The digest of every part."""
        return [
            _folded(part, _rows(rows, part, self._dtype)) for part, rows in zip(self.parts, self._views, strict=True)
        ]

    @torch.no_grad()
    def rows(self, index: int) -> list[int]:
        """The digests of the rows of one part, to find the first that differs."""
        return _rows(self._views[index], self.parts[index], self._dtype).tolist()


def digest(values: Tensor, rectangle: Rectangle) -> int:
    """The digest of this rectangle of an HF tensor, in the values' own dtype; those of disjoint ones add up."""
    part = Part(Piece(rank=0, name="", index=tuple((0, n) for n in values.shape)), "", rectangle)
    return _folded(part, _rows(_as_rows(values, part), part, values.dtype))


@torch.no_grad()
def tensor_digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The digest of each whole HF tensor, 16 hex digits, as it stands in conversion.json.

    Of [experts, rows, columns] it is that of [experts * rows, columns].
    """
    digests = {}
    for name, tensor in tensors.items():
        height, width = (tensor.numel() // tensor.shape[-1], tensor.shape[-1]) if tensor.dim() > 1 else (len(tensor), 1)
        digests[name] = _hex(digest(tensor, (0, height, 0, width)))
    return digests


def first_bad_row(tensor: Tensor, sent: Iterable[tuple[Rectangle, Sequence[int]]]) -> int:
    """The first row of a whole HF tensor whose digest is not that of what was sent; -1 if all are.

    `sent` are rectangles that together are the tensor, each with the digests of its rows.
    """
    rows = [0] * len(tensor)
    for (start, _, _, _), digests in sent:
        for row, value in enumerate(digests, start):
            rows[row] += value
    rectangle = (0, len(tensor), 0, tensor.shape[1] if tensor.dim() > 1 else 1)
    part = Part(Piece(rank=0, name="", index=tuple((0, n) for n in tensor.shape)), "", rectangle)
    actual = _rows(_as_rows(tensor, part), part, tensor.dtype).tolist()
    return next((row for row, (a, b) in enumerate(zip(rows, actual, strict=True)) if (a - b) & _MASK), -1)


def mismatch(version: int, part: Part, where: str, sent: Iterable[int], received: Iterable[int]) -> WeightMismatch:
    """The error of a part whose digest is wrong, from the digests of its rows as sent and as received."""
    for row, (expected, actual) in enumerate(zip(sent, received, strict=True), part.rectangle[0]):
        if expected != actual:
            detail = f"digest expected {_hex(expected)}, got {_hex(actual)}, in {part.piece.name}"
            return WeightMismatch(version=version, tensor=part.hf, where=where, row=row, detail=detail)
    detail = f"its digest was wrong and is right now: {part.piece.name} changes while nobody should write to it"
    return WeightMismatch(version=version, tensor=part.hf, where=where, row=-1, detail=detail)


def _hex(digest: int) -> str:
    """The digest in 16 hex digits."""
    return f"{digest & _MASK:016x}"


def _as_rows(tensor: Tensor, part: Part) -> Tensor:
    """The tensor as a matrix of the rectangle's shape: a vector is one column, an expert axis joins the rows."""
    rows = tensor.unsqueeze(1) if tensor.dim() == 1 else tensor.view(-1, tensor.shape[-1])
    r0, r1, c0, c1 = part.rectangle
    if tuple(rows.shape) != (r1 - r0, c1 - c0):
        raise ValueError(f"{part.piece.name} has {tuple(rows.shape)} where {part.hf} has {(r1 - r0, c1 - c0)}")
    return rows


def _rows(rows: Tensor, part: Part, dtype: torch.dtype) -> Tensor:
    """The digest of each row, [rows] int64."""
    start, stop = part.rectangle[2:]
    columns = max(_WORD_BYTES, dtype.itemsize) // dtype.itemsize  # of a word
    factors = _multipliers(_COLUMN_SEED, start // columns, -(-stop // columns), rows.device)  # of the words they touch
    step = min(len(rows), max(1, _CHUNK_WORDS // len(factors)))
    before, width = start % columns, len(factors) * columns
    return torch.cat([_products(_words(chunk, before, width, dtype), factors) for chunk in rows.split(step)])


def _words(rows: Tensor, before: int, width: int, dtype: torch.dtype) -> Tensor:
    """[rows, words] of the rows with `before` zeros in front and `width` columns in all; no copy if that can be."""
    word = max(_WORD_BYTES, dtype.itemsize)
    starts = (before, rows.shape[-1], rows.storage_offset(), *rows.stride()[:-1])
    lie_in_words = rows.dtype == dtype and rows.stride(-1) == 1 and not any(n * dtype.itemsize % word for n in starts)
    if not lie_in_words or rows.data_ptr() % word:  # of a mapped file
        padded = rows.new_zeros((*rows.shape[:-1], width), dtype=dtype)
        padded[..., before : before + rows.shape[-1]] = rows
        rows = padded
    return rows.view(_INTEGERS[word])


def _products(words: Tensor, factors: Tensor) -> Tensor:
    """The sum of the products in each row, [rows] int64."""
    if words.device.type == "cpu":  # one pass by numpy, two by torch
        return torch.from_numpy(np.einsum("ij,j->i", words.numpy(), factors.numpy()))
    return (words * factors).sum(1)


def _folded(part: Part, rows: Tensor) -> int:
    r0, r1, _, _ = part.rectangle
    return int((rows * _multipliers(_ROW_SEED, r0, r1, rows.device)).sum())


@lru_cache(maxsize=256)
def _multipliers(seed: int, start: int, stop: int, device: torch.device) -> Tensor:
    """The fixed numbers of positions start..stop-1, int64."""
    return _mixed(torch.arange(start, stop), seed).to(device)


def _mixed(index: Tensor, seed: int) -> Tensor:
    """Odd pseudo-random int64 of each index."""
    return splitmix64((index + 1) * GAMMA + signed(seed)) | 1


def splitmix64(z: Tensor) -> Tensor:
    """Return pseudo-random int64 of each int64 (Steele, Lea, Flood 2014); torch's arithmetic wraps around."""
    z = (z ^ shifted(z, 30)) * signed(0xBF58476D1CE4E5B9)
    z = (z ^ shifted(z, 27)) * signed(0x94D049BB133111EB)
    return z ^ shifted(z, 31)


def shifted(numbers: Tensor, places: int) -> Tensor:
    """Return int64 numbers shifted right as if they had no sign."""
    return (numbers >> places) & ((1 << (64 - places)) - 1)


def signed(value: int) -> int:
    """Return 64 bits as int64 reads them."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


GAMMA = signed(0x9E3779B97F4A7C15)  # splitmix64's step from one number to the next
