"""A plan: every overlap of a source tiling with a target tiling, in HF coordinates. Pure and deterministic.

HF import, HF export, trainer -> engine sync and checkpoint reshape differ only in the two tilings. Where several source
ranks hold the same rectangle (data-parallel replicas, norms on every tensor rank, tied copies) one is chosen, so that
the bytes spread over the replicas. Every target tile is covered exactly once, or there is no plan.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from conversion.tiles import Span, Tile

Rectangle = tuple[int, int, int, int]  # row start, row stop, column start, column stop; a 1-D parameter is one column


class PlanError(ValueError):
    """A target tile that the source does not cover exactly once; the message names parameter and part."""


class WeightMismatch(RuntimeError):  # noqa: N818  it is the finding that is named
    """An end does not hold what it was sent. `tensor` names the parameter, `row` the first bad row in it."""

    def __init__(self, *, version: int, tensor: str, where: str, row: int, detail: str) -> None:
        self.version, self.tensor, self.where, self.row, self.detail = version, tensor, where, row, detail
        super().__init__(
            f"weights of version {version}: {where} does not hold {tensor} as it was sent, first bad row {row}: "
            f"{detail}. What it computes is not of these weights, so the run stops; start it again from its newest "
            "checkpoint, and report this"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A rectangle of a local tensor: `name[index]` on `rank`, with one (start, stop) per dimension.

    In a tensor of three dimensions it lies in one plane of the first; `shape` and `slices` leave that dimension out, so
    that a piece always has the shape of its rectangle in HF coordinates.
    """

    rank: int
    name: str
    index: tuple[Span, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.index[-2:])

    @property
    def slices(self) -> tuple[int | slice, ...]:
        """`index`, to subscript a tensor with."""
        planes = tuple(start for start, _ in self.index[:-2])  # an integer: the dimension goes
        return (*planes, *(slice(start, stop) for start, stop in self.index[-2:]))

    @property
    def num_elements(self) -> int:
        return math.prod(stop - start for start, stop in self.index)


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """`target` receives the values of `source`, which are `rectangle` of HF parameter `hf`; the shapes are the same."""

    source: Piece
    target: Piece
    hf: str
    rectangle: Rectangle


@dataclass(frozen=True, kw_only=True)
class WeightPlan:
    """All copies, in the order of the target's tiles."""

    copies: tuple[Copy, ...]

    def from_rank(self, rank: int) -> Sequence[Copy]:
        """The copies that read from this source rank."""
        return self._by_source.get(rank, ())

    def to_rank(self, rank: int) -> Sequence[Copy]:
        """The copies that write to this target rank."""
        return self._by_target.get(rank, ())

    @cached_property
    def _by_source(self) -> dict[int, list[Copy]]:
        return _grouped(self.copies, lambda copy: copy.source.rank)

    @cached_property
    def _by_target(self) -> dict[int, list[Copy]]:
        return _grouped(self.copies, lambda copy: copy.target.rank)


def _grouped(copies: Iterable[Copy], rank: Callable[[Copy], int]) -> dict[int, list[Copy]]:
    groups: defaultdict[int, list[Copy]] = defaultdict(list)
    for copy in copies:
        groups[rank(copy)].append(copy)
    return dict(groups)


@dataclass(frozen=True, slots=True)
class _Overlap:
    """The part of a target tile that the holders of one source rectangle can give."""

    target: Tile
    rectangle: Rectangle
    holders: tuple[Tile, ...]

    @property
    def key(self) -> tuple[str, Rectangle, Rectangle]:
        """Equal for the overlaps that want the same piece, which must come from the same holder."""
        return self.target.hf, self.rectangle, _rectangle(self.holders[0])


def plan(source: Sequence[Tile], target: Sequence[Tile]) -> WeightPlan:
    """The plan that fills every target tile from the source. PlanError if one is not covered exactly once."""
    holders: dict[str, dict[Rectangle, list[Tile]]] = defaultdict(lambda: defaultdict(list))
    for tile in source:
        holders[tile.hf][_rectangle(tile)].append(tile)
    sources = {
        hf: [(rectangle, tuple(tiles)) for rectangle, tiles in rectangles.items()] for hf, rectangles in holders.items()
    }
    overlaps: list[_Overlap] = []
    for tile in target:
        overlaps += _cover(tile, sources.get(tile.hf, []))
    chosen = _choose(overlaps)
    return WeightPlan(
        copies=tuple(
            Copy(
                source=_piece(chosen[o.key], o.rectangle),
                target=_piece(o.target, o.rectangle),
                hf=o.target.hf,
                rectangle=o.rectangle,
            )
            for o in overlaps
        )
    )


def _cover(target: Tile, sources: Sequence[tuple[Rectangle, tuple[Tile, ...]]]) -> list[_Overlap]:
    """The overlaps of one target tile with the source, proven to cover it exactly."""
    wanted = _rectangle(target)
    overlaps: list[_Overlap] = []
    missing = [wanted]
    for rectangle, tiles in sources:
        common = _intersection(wanted, rectangle)
        if common is None:
            continue
        if (tiles[0].cols is None) != (target.cols is None):
            raise PlanError(
                f"{target.hf}: {_dimensions(tiles[0])} in the source and {_dimensions(target)} in the target"
            )
        overlaps.append(_Overlap(target, common, tiles))
        missing = [rest for hole in missing for rest in _difference(hole, common)]  # what is left of each hole
    where = f"for {target.name} on target rank {target.rank}"
    if missing:
        raise PlanError(f"{target.hf}: the source does not hold {_described(missing[0], target)}, {where}")
    if sum(_area(o.rectangle) for o in overlaps) != _area(wanted):  # nothing is missing, so some part comes twice
        raise PlanError(f"{target.hf}: source tiles overlap in part within {_described(wanted, target)}, {where}")
    return overlaps


def _choose(overlaps: Sequence[_Overlap]) -> dict[tuple[str, Rectangle, Rectangle], Tile]:
    """One holder for every distinct piece: of its holders the one with least to send so far, largest pieces first."""
    sent: dict[int, int] = defaultdict(int)
    chosen: dict[tuple[str, Rectangle, Rectangle], Tile] = {}
    distinct = {overlap.key: overlap for overlap in overlaps}
    for key, overlap in sorted(distinct.items(), key=lambda item: -_area(item[1].rectangle)):
        holder = min(overlap.holders, key=lambda tile: (sent[tile.rank], tile.rank))
        sent[holder.rank] += _area(overlap.rectangle)
        chosen[key] = holder
    return chosen


def _piece(tile: Tile, part: Rectangle) -> Piece:
    """The place of an HF rectangle in the tile that holds it."""
    row = tile.row0 - tile.rows[0]  # from a row of the HF parameter to the local tensor's
    rows = (part[0] + row, part[1] + row)
    if tile.cols is None:
        return Piece(rank=tile.rank, name=tile.name, index=(rows,))
    col = tile.col0 - tile.cols[0]
    planes = () if tile.plane is None else ((tile.plane, tile.plane + 1),)
    return Piece(rank=tile.rank, name=tile.name, index=(*planes, rows, (part[2] + col, part[3] + col)))


def _rectangle(tile: Tile) -> Rectangle:
    c0, c1 = tile.cols or (0, 1)
    return tile.rows[0], tile.rows[1], c0, c1


def _area(r: Rectangle) -> int:
    return (r[1] - r[0]) * (r[3] - r[2])


def _intersection(a: Rectangle, b: Rectangle) -> Rectangle | None:
    both = (max(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), min(a[3], b[3]))
    return both if both[0] < both[1] and both[2] < both[3] else None


def _difference(a: Rectangle, b: Rectangle) -> list[Rectangle]:
    """The rectangles that are left of `a` without `b`: above, below, left, right."""
    common = _intersection(a, b)
    if common is None:
        return [a]
    r0, r1, c0, c1 = common
    # above and below in full width, left and right in the height of what both have
    rest = [(a[0], r0, a[2], a[3]), (r1, a[1], a[2], a[3]), (r0, r1, a[2], c0), (r0, r1, c1, a[3])]
    return [r for r in rest if r[0] < r[1] and r[2] < r[3]]


def _described(r: Rectangle, tile: Tile) -> str:
    rows = f"rows {r[0]}:{r[1]}"
    return rows if tile.cols is None else f"{rows}, columns {r[2]}:{r[3]}"


def _dimensions(tile: Tile) -> str:
    return "a vector" if tile.cols is None else "a matrix"
