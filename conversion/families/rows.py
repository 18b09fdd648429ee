"""The kinds of row a family's table is made of: how one parameter (or a fused group) is cut, in each of the layouts.

A row knows its names at the three ends and answers two questions: which HF tensors are these, and what does shard t of
a tensor axis hold of them, in Megatron and in vLLM. Nothing here knows a direction; `conversion.plan` makes those.

In names, {i} is the layer in the whole model, {n} the layer in its pipeline stage, {part} the member of a fused group,
{e} the expert: in HF of all, in Megatron of the rank's own.
Shapes: V vocabulary, H hidden, F feed-forward, D head dimension, E experts.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from conversion.tiles import Cell, Span, share

Shape = tuple[int, ...]

VLLM_VOCABULARY_MULTIPLE = 64  # vLLM's DEFAULT_VOCAB_PADDING_SIZE: before sharding, at every tensor size


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimensions:
    """The sizes of one model."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tied: bool
    num_experts: int = 0
    experts_per_token: int = 0
    moe_intermediate_size: int = 0  # of one expert


@dataclass(frozen=True, slots=True)
class Block:
    """`hf[rows, cols]` lies at `local[plane, row0:, col0:]`: a Tile that has no rank and no layer yet."""

    hf: str
    rows: Span
    cols: Span | None
    row0: int = 0
    col0: int = 0
    plane: int | None = None


@dataclass(frozen=True, slots=True)
class Shard:
    """What one rank holds of a row: the full local shape, padding included, and the blocks that lie in it."""

    shape: Shape
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One parameter at the three ends. `megatron_fused_norms` is its Megatron name in Transformer Engine's spec.

    `vllm` is given where vLLM fuses it with others; else it has the name of HF there.
    """

    hf: str
    megatron: str
    vllm: str | None = None
    megatron_fused_norms: str | None = None
    stage: Literal["first", "every layer", "last"] = "every layer"
    tied_to: str | None = None  # the HF parameter this one is, where the configuration ties them

    def hf_shapes(self, dims: Dimensions) -> dict[str, Shape]:
        """HF names (with {i}) and shapes."""
        raise NotImplementedError

    def megatron_shards(self, dims: Dimensions, cell: Cell) -> Iterator[tuple[str, Shard]]:
        """Names (with {n}) and shards of what a Megatron rank in `cell` holds of a layer."""
        name = (cell.layout.fused_norms and self.megatron_fused_norms) or self.megatron
        yield name, self.shard(dims, cell.layout.tensor, cell.tensor)

    def vllm_shard(self, dims: Dimensions, tensor: int, t: int) -> Shard:
        """What worker `t` of vLLM's tensor axis holds; as in Megatron, unless the row says otherwise."""
        return self.shard(dims, tensor, t)

    def shard(self, dims: Dimensions, tensor: int, t: int) -> Shard:
        """Shard `t` of a tensor axis."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True)
class Replicated(Row):
    """A parameter that every rank holds whole: a norm, a router. `sizes` are names of Dimensions."""

    sizes: tuple[str, ...] = ("hidden_size",)

    def hf_shapes(self, dims: Dimensions) -> dict[str, Shape]:
        return {self.hf: tuple(getattr(dims, size) for size in self.sizes)}

    def shard(self, dims: Dimensions, tensor: int, t: int) -> Shard:
        (shape,) = self.hf_shapes(dims).values()
        return Shard(shape, (Block(self.hf, (0, shape[0]), (0, shape[1]) if len(shape) == 2 else None),))


class AttentionOutput(Row):
    """[H, heads * D], its input columns split by whole heads."""

    def hf_shapes(self, dims: Dimensions) -> dict[str, Shape]:
        return {self.hf: (dims.hidden_size, dims.num_heads * dims.head_dim)}

    def shard(self, dims: Dimensions, tensor: int, t: int) -> Shard:
        cols = _scaled(share(dims.num_heads, tensor, t, "num_attention_heads", "tensor"), dims.head_dim)
        return _column_split(self.hf, dims.hidden_size, cols)


class FeedForward(Row):
    """What the rows of a feed-forward share: the name of its width in the configuration and in Dimensions."""

    width: ClassVar[str] = "intermediate_size"

    def split(self, dims: Dimensions, tensor: int, t: int) -> Span:
        """The part of F that shard `t` holds."""
        return share(getattr(dims, self.width), tensor, t, self.width, "tensor")


class FeedForwardOutput(FeedForward):
    """[H, F], its input columns split."""

    def hf_shapes(self, dims: Dimensions) -> dict[str, Shape]:
        return {self.hf: (dims.hidden_size, getattr(dims, self.width))}

    def shard(self, dims: Dimensions, tensor: int, t: int) -> Shard:
        return _column_split(self.hf, dims.hidden_size, self.split(dims, tensor, t))


class GateUp(FeedForward):
    """gate [F, H] and up [F, H] fused as [gate shard | up shard], at both ends."""

    def hf_shapes(self, dims: Dimensions) -> dict[str, Shape]:
        return {_part(self.hf, part): (getattr(dims, self.width), dims.hidden_size) for part in ("gate", "up")}

    def shard(self, dims: Dimensions, tensor: int, t: int) -> Shard:
        rows = self.split(dims, tensor, t)
        return _stacked([(_part(self.hf, part), rows) for part in ("gate", "up")], dims.hidden_size)


class PerExpert(FeedForward):
    """A feed-forward row once an expert: Megatron keeps them apart, vLLM stacks all in one tensor [E, ...].

    Megatron's expert axis gives each rank whole experts, in order; inside one, its tensor axis splits as elsewhere.
    The Megatron names are those of SequentialMLP, which its specs build without grouped GEMM (a CPU has no other).
    """

    width = "moe_intermediate_size"

    def hf_shapes(self, dims: Dimensions) -> dict[str, Shape]:
        shapes = super().hf_shapes(dims)
        return {_expert(hf, e): shape for e in range(dims.num_experts) for hf, shape in shapes.items()}

    def megatron_shards(self, dims: Dimensions, cell: Cell) -> Iterator[tuple[str, Shard]]:
        layout = cell.layout
        shard = self.shard(dims, layout.tensor, cell.tensor)
        experts = range(*share(dims.num_experts, layout.expert, cell.expert, "num_experts", "expert"))
        for own, e in enumerate(experts):
            blocks = tuple(replace(block, hf=_expert(block.hf, e)) for block in shard.blocks)
            yield _expert(self.megatron, own), Shard(shard.shape, blocks)

    def vllm_shard(self, dims: Dimensions, tensor: int, t: int) -> Shard:
        shard, experts = self.shard(dims, tensor, t), range(dims.num_experts)
        blocks = tuple(replace(block, hf=_expert(block.hf, e), plane=e) for e in experts for block in shard.blocks)
        return Shard((len(experts), *shard.shape), blocks)


class ExpertGateUp(PerExpert, GateUp):
    """gate and up of every expert."""


class ExpertOutput(PerExpert, FeedForwardOutput):
    """The output matrix of every expert."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QKV(Row):
    """q, k and v fused: Megatron interleaves them by query group, vLLM stacks [q shard | k shard | v shard]."""

    bias: bool = False

    def hf_shapes(self, dims: Dimensions) -> dict[str, Shape]:
        rest = () if self.bias else (dims.hidden_size,)
        heads = {"q": dims.num_heads, "k": dims.num_kv_heads, "v": dims.num_kv_heads}
        return {_part(self.hf, part): (n * dims.head_dim, *rest) for part, n in heads.items()}

    def shard(self, dims: Dimensions, tensor: int, t: int) -> Shard:
        """An equal cut of: query group after query group, each its query heads, its key head, its value head.

        Where the axis is longer than the groups, Megatron cuts right through them, wherever the rows then end, and puts
        the whole together again in the forward pass (megatron/core/transformer/attention.py).
        """
        D, groups = dims.head_dim, dims.num_kv_heads
        _check_groups(dims, tensor, "Megatron")
        share(dims.num_heads, tensor, t, "num_attention_heads", "tensor")
        heads = {"q": dims.num_heads // groups * D, "k": D, "v": D}  # rows of a group
        window = share((dims.num_heads + 2 * groups) * D, tensor, t, "rows of query, key and value", "tensor")
        parts, row = [], 0
        for g in range(groups):
            for part, size in heads.items():
                start, stop = max(row, window[0]), min(row + size, window[1])  # of the fused rows, in this shard
                if start < stop:
                    offset = g * size - row  # from a fused row to the row of q, k or v
                    parts.append((_part(self.hf, part), (start + offset, stop + offset)))
                row += size
        return _stacked(parts, None if self.bias else dims.hidden_size)

    def vllm_shard(self, dims: Dimensions, tensor: int, t: int) -> Shard:
        """Where the axis is longer than the key-value heads, neighbours hold the same one."""
        q = share(dims.num_heads, tensor, t, "num_attention_heads", "tensor")
        heads = dims.num_kv_heads
        _check_groups(dims, tensor, "vLLM")
        if tensor <= heads:
            kv = share(heads, tensor, t, "num_key_value_heads", "tensor")
        else:
            kv = share(heads, heads, t // (tensor // heads))  # so many neighbours have one head
        spans = {"q": q, "k": kv, "v": kv}
        parts = [(_part(self.hf, part), _scaled(span, dims.head_dim)) for part, span in spans.items()]
        return _stacked(parts, None if self.bias else dims.hidden_size)


class Vocabulary(Row):
    """[V, H], its rows padded and then split; the padding is a region no block covers."""

    def hf_shapes(self, dims: Dimensions) -> dict[str, Shape]:
        return {} if dims.tied and self.tied_to else {self.hf: (dims.vocab_size, dims.hidden_size)}

    def megatron_shards(self, dims: Dimensions, cell: Cell) -> Iterator[tuple[str, Shard]]:
        tensor = cell.layout.tensor
        padded = rounded_up(dims.vocab_size, tensor * cell.layout.vocabulary_multiple)
        yield self.megatron, self._shard(dims, tensor, cell.tensor, padded)

    def vllm_shard(self, dims: Dimensions, tensor: int, t: int) -> Shard:
        return self._shard(dims, tensor, t, padded=rounded_up(dims.vocab_size, VLLM_VOCABULARY_MULTIPLE))

    def _shard(self, dims: Dimensions, tensor: int, t: int, padded: int) -> Shard:
        hf = self.tied_to if dims.tied and self.tied_to else self.hf
        start, stop = share(padded, tensor, t, "padded vocab_size", "tensor")
        rows = (start, min(stop, dims.vocab_size))  # empty where the shard is all padding
        blocks = (Block(hf, rows, (0, dims.hidden_size)),) if rows[0] < rows[1] else ()
        return Shard((stop - start, dims.hidden_size), blocks)


def rounded_up(n: int, multiple: int) -> int:
    """The least multiple of `multiple` that is not below n."""
    return -(-n // multiple) * multiple


def _check_groups(dims: Dimensions, tensor: int, who: str) -> None:
    groups = dims.num_kv_heads
    if groups % tensor and tensor % groups:
        sizes = (n for n in range(1, 65) if dims.num_heads % n == 0)
        fitting = [str(n) for n in sizes if groups % n == 0 or n % groups == 0]
        raise ValueError(
            f"num_key_value_heads={groups} does not divide by tensor={tensor}, nor the other way round: {who} needs "
            f"one of the two; of the sizes up to 64 that divide the heads these do: {', '.join(fitting)}"
        )


def _part(hf: str, part: str) -> str:
    return hf.replace("{part}", part)


def _expert(name: str, expert: int) -> str:
    return name.replace("{e}", str(expert))


def _scaled(span: Span, factor: int) -> Span:
    return span[0] * factor, span[1] * factor


def _column_split(hf: str, height: int, cols: Span) -> Shard:
    return Shard((height, cols[1] - cols[0]), (Block(hf, (0, height), cols),))


def _stacked(parts: list[tuple[str, Span]], width: int | None) -> Shard:
    """The parts one below the other; a bias if `width` is None."""
    blocks, row = [], 0
    for hf, rows in parts:
        blocks.append(Block(hf, rows, None if width is None else (0, width), row))  # local rows from `row` on
        row += rows[1] - rows[0]
    return Shard((row,) if width is None else (row, width), tuple(blocks))
