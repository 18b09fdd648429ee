"""The bucket schedule: in which order and at which offsets a source rank sends its pieces. Pure, from the plan alone.

Both ends derive the same schedule, so nothing but bytes has to cross. Each distinct piece is packed once, whoever and
however many want it; a bucket holds whole pieces, and a piece larger than a bucket is cut by rows (a row larger than
one, by columns). Where buckets are messages, each holds only what the same receivers want: nobody is sent what another
one needs.
"""

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from conversion.plan import Piece, WeightPlan
from conversion.tiles import Span

ALIGNMENT_BYTES = 64  # a cache line; also what the widest vector loads and DMA engines like
BUCKET_BYTES = 64 << 20  # the default bound

Box = tuple[Span, ...]  # a part of a piece, counted from the piece's own corner


@dataclass(frozen=True, slots=True)
class Fragment:
    """The part `box` of a piece, at a byte offset of its bucket."""

    piece: Piece
    box: Box
    offset: int

    @property
    def num_elements(self) -> int:
        return math.prod(stop - start for start, stop in self.box)


@dataclass(frozen=True)
class Schedule:
    """What one source rank sends, bucket after bucket; `sizes` are the buckets' bytes, none above the bound."""

    buckets: tuple[tuple[Fragment, ...], ...]
    sizes: tuple[int, ...]

    @property
    def total_bytes(self) -> int:
        return sum(self.sizes)

    @property
    def slot_bytes(self) -> int:
        """What one buffer must hold: the largest bucket."""
        return max(self.sizes, default=0)

    @property
    def num_slots(self) -> int:
        """Two, so that packing one bucket overlaps the consuming of the one before; one where one bucket is all."""
        return min(2, len(self.buckets))

    def slots(self) -> list[int]:
        """The byte at which each bucket's slot begins: they take turns."""
        return [number % self.num_slots * self.slot_bytes for number in range(len(self.buckets))]

    def fingerprint(self, wire: str) -> int:
        """Equal at two ends that derived the same schedule, for what the wire is called here: its dtype."""
        return zlib.crc32(repr((self.buckets, self.sizes, wire)).encode())


def schedule(
    plan: WeightPlan, source_rank: int, itemsize: int, bucket_bytes: int = BUCKET_BYTES, *, apart: bool = False
) -> Schedule:
    """The buckets of `source_rank`, at `itemsize` bytes an element. ValueError if a bucket could not hold one.

    `apart`: whoever wants something of a bucket wants all of it.
    """
    room = bucket_bytes // ALIGNMENT_BYTES * ALIGNMENT_BYTES
    if room < ALIGNMENT_BYTES:
        raise ValueError(f"bucket_bytes={bucket_bytes}: expected at least {ALIGNMENT_BYTES}")
    wanting: dict[Piece, set[int]] = {}
    for copy in plan.from_rank(source_rank):
        wanting.setdefault(copy.source, set()).add(copy.target.rank if apart else 0)
    buckets: list[list[Fragment]] = []
    sizes: list[int] = []
    latest: dict[frozenset[int], int] = {}  # the bucket that is being filled for these receivers
    for piece, ranks in wanting.items():
        receivers = frozenset(ranks)
        for box in _cut(piece.shape, room // itemsize):
            elements = math.prod(stop - start for start, stop in box)
            size = -(-elements * itemsize // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
            number = latest.get(receivers)
            if number is None or sizes[number] + size > room:
                number = latest[receivers] = len(buckets)
                buckets.append([])
                sizes.append(0)
            buckets[number].append(Fragment(piece, box, sizes[number]))
            sizes[number] += size
    return Schedule(buckets=tuple(map(tuple, buckets)), sizes=tuple(sizes))


def wanted(plan: WeightPlan, order: Schedule, source_rank: int, target_rank: int) -> dict[int, list[tuple[int, Piece]]]:
    """Bucket number -> (byte offset, the target's piece) of what `target_rank` takes out of it, in order."""
    targets: dict[Piece, list[Piece]] = {}
    for copy in plan.to_rank(target_rank):
        if copy.source.rank == source_rank:
            targets.setdefault(copy.source, []).append(copy.target)
    by_bucket: dict[int, list[tuple[int, Piece]]] = {}
    for number, bucket in enumerate(order.buckets):
        taken = [(f.offset, part(target, f.box)) for f in bucket for target in targets.get(f.piece, ())]
        if taken:
            by_bucket[number] = taken
    return by_bucket


def part(piece: Piece, box: Box) -> Piece:
    """The part of a piece that `box` counts from its corner; an axis of one that only one side has is left alone."""
    missing = len(piece.index) - len(box)
    box = ((0, 1),) * missing + box if missing >= 0 else box[-missing:]
    spans = zip(piece.index, box, strict=True)
    return Piece(rank=piece.rank, name=piece.name, index=tuple((at + a, at + b) for (at, _), (a, b) in spans))


def _cut(shape: tuple[int, ...], limit: int) -> Iterator[Box]:
    """The parts of a piece, in order, none of more than `limit` elements."""
    row = math.prod(shape[1:])
    if row > limit:
        for index in range(shape[0]):
            for rest in _cut(shape[1:], limit):
                yield ((index, index + 1), *rest)
        return
    step = limit // row
    for start in range(0, shape[0], step):
        yield ((start, min(start + step, shape[0])), *((0, size) for size in shape[1:]))
