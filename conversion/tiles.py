"""Rectangles of HF parameters and where they lie: the vocabulary every layout is described in.

HF is the coordinate system. A `Tile` says that a rectangle of an HF parameter lies at a place of a local tensor of a
rank; a layout is a list of tiles. Padding is a region no tile covers, a replica is a second tile with the same
rectangle. What a layout looks like for one architecture stands in `conversion.families`.
"""

from dataclasses import dataclass

Span = tuple[int, int]  # half-open [start, stop)
MOST_RANKS = 1 << 16
_SENDING_REPLICAS = 64  # of more, the busiest would hardly send less: a matrix is one rank's to send


@dataclass(frozen=True, slots=True)
class Tile:
    """`hf[rows, cols]` lies at `local[row0:, col0:]` of tensor `name` on `rank`; `cols` is None for a 1-D parameter.

    HF parameters have one or two dimensions. With a `plane` the local tensor has a third, leading one, and the place is
    `local[plane, row0:, col0:]`: the fused experts of a vLLM worker.
    """

    rank: int
    name: str
    hf: str
    rows: Span
    cols: Span | None
    row0: int = 0
    col0: int = 0
    plane: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelLayout:
    """How a Megatron model is spread over ranks: the sizes of the axes, and how its modules are built.

    The ranks of `context` share the tokens of each sequence, those of `data` the sequences: both hold the same weights.
    `expert` divides context * data: the ranks that hold different experts are replicas of everything else (Megatron's
    default order "tp-cp-ep-dp-pp", experts split by `tensor` too). `virtual` is the number of model chunks a stage
    holds in Megatron's interleaved schedule; their tensors are named `model0.`, `model1.`, ... as in Megatron's
    checkpoints.
    `vocabulary_multiple` is Megatron-LM's make_vocab_size_divisible_by, 128 there by default: the vocabulary is padded
    to a multiple of it times `tensor`. `fused_norms` is False for Megatron's local spec and True for Transformer
    Engine's, which keeps the norms inside the linear layers that follow them.
    """

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    fused_norms: bool = False
    expert: int = 1
    virtual: int = 1
    vocabulary_multiple: int = 1
    context: int = 1

    def __post_init__(self) -> None:
        for axis in ("tensor", "pipeline", "context", "data", "expert", "virtual", "vocabulary_multiple"):
            size = getattr(self, axis)
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{axis}={size!r}: expected a whole number of at least 1")
        if self.world_size > MOST_RANKS:
            raise ValueError(
                f"tensor={self.tensor}, pipeline={self.pipeline}, context={self.context} and data={self.data} make "
                f"{self.world_size} ranks: expected at most {MOST_RANKS}"
            )
        if self.replicas % self.expert:
            raise ValueError(
                f"context * data={self.replicas} does not divide by expert={self.expert}: experts are spread over the "
                f"ranks that hold the same weights; choose context * data as a multiple of expert"
            )
        if self.virtual > 1 and self.pipeline == 1:
            raise ValueError(f"virtual={self.virtual} needs pipeline > 1: Megatron interleaves chunks of stages")

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return self.tensor * self.pipeline * self.replicas

    @property
    def replicas(self) -> int:
        """How many ranks hold the same weights, experts apart."""
        return self.context * self.data

    def coordinates(self, rank: int) -> tuple[int, int, int, int]:
        """(tensor, pipeline, data, context) of a global rank, in Megatron's default order "tp-cp-ep-dp-pp"."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside this layout of {self.world_size} ranks")
        # rank = tensor + T * (context + C * (data + D * pipeline)), with T, C, D the sizes of the axes
        rest, tensor = divmod(rank, self.tensor)
        rest, context = divmod(rest, self.context)
        pipeline, data = divmod(rest, self.data)
        return tensor, pipeline, data, context

    def senders(self) -> list[int]:
        """The ranks that weights are taken from: all, but of thousands of replicas the first, which have all of them.

        A plan over these alone takes each of its ends no longer for 8,192 ranks than for a few hundred.
        """
        most = max(_SENDING_REPLICAS, self.expert)
        return [rank for rank in range(self.world_size) if self._replica(rank) < most]

    def cell(self, rank: int) -> "Cell":
        """What of the model lies on `rank`."""
        tensor, pipeline, _, _ = self.coordinates(rank)
        return Cell(layout=self, tensor=tensor, pipeline=pipeline, expert=self._replica(rank) % self.expert)

    def _replica(self, rank: int) -> int:
        """Which of the `replicas` a rank is in, context first."""
        _, _, data, context = self.coordinates(rank)
        return context + self.context * data


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A rank's part of a layout: its index on each axis that splits weights. Replicas have equal cells."""

    layout: ParallelLayout
    tensor: int
    pipeline: int
    expert: int


def share(n: int, parts: int, i: int, name: str = "size", axis: str = "parts") -> Span:
    """The i-th of `parts` equal shares of range(n). ValueError, with `name` and `axis`, if n does not divide."""
    if n % parts:
        fitting = ", ".join(str(size) for size in range(1, 65) if n % size == 0)
        raise ValueError(f"{name}={n} does not divide by {axis}={parts}; of the sizes up to 64 it does by {fitting}")
    if not 0 <= i < parts:
        raise ValueError(f"share {i} of {axis}={parts} does not exist")
    size = n // parts
    return i * size, (i + 1) * size
