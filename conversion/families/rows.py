"""The kinds of row a family's table is made of: how one parameter (or a fused group) is cut, in each of the layouts.

A row knows its names at the three ends and answers two questions: which HF tensors are these, and what does shard t of
a tensor axis hold of them, in Megatron and in vLLM. Nothing here knows a direction; `conversion.plan` makes those.

In names, {i} is the layer in the whole model, {n} the layer in its pipeline stage, {part} the member of a fused group.
Shapes: V vocabulary, H hidden, F feed-forward, D head dimension.
"""

from dataclasses import dataclass
from typing import Literal

from conversion.tiles import Span, share

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


@dataclass(frozen=True, slots=True)
class Block:
    """`hf[rows, cols]` lies at `local[row0:, col0:]`: a Tile that has no rank and no layer yet."""

    hf: str
    rows: Span
    cols: Span | None
    row0: int = 0
    col0: int = 0


@dataclass(frozen=True, slots=True)
class Shard:
    """What one rank holds of a row: the full local shape, padding included, and the blocks that lie in it."""

    shape: Shape
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One parameter at the three ends. `megatron_fused_norms` is its Megatron name in Transformer Engine's spec."""

    hf: str
    megatron: str
    vllm: str
    megatron_fused_norms: str | None = None
    stage: Literal["first", "every layer", "last"] = "every layer"
    tied_to: str | None = None  # the HF parameter this one is, where the configuration ties them

    def hf_shapes(self, dims: Dimensions) -> dict[str, Shape]:
        """HF names (with {i}) and shapes."""
        raise NotImplementedError

    def megatron_shard(self, dims: Dimensions, tensor: int, t: int) -> Shard:
        """What shard `t` of Megatron's tensor axis holds."""
        raise NotImplementedError

    def vllm_shard(self, dims: Dimensions, tensor: int, t: int) -> Shard:
        """What worker `t` of vLLM's tensor axis holds; as in Megatron, unless the row says otherwise."""
        return self.megatron_shard(dims, tensor, t)


class Replicated(Row):
    """A vector [H] that every tensor rank holds whole: a norm."""

    def hf_shapes(self, dims: Dimensions) -> dict[str, Shape]:
        return {self.hf: (dims.hidden_size,)}

    def megatron_shard(self, dims: Dimensions, tensor: int, t: int) -> Shard:
        H = dims.hidden_size
        return Shard((H,), (Block(self.hf, (0, H), None),))


class AttentionOutput(Row):
    """[H, heads * D], its input columns split by whole heads."""

    def hf_shapes(self, dims: Dimensions) -> dict[str, Shape]:
        return {self.hf: (dims.hidden_size, dims.num_heads * dims.head_dim)}

    def megatron_shard(self, dims: Dimensions, tensor: int, t: int) -> Shard:
        cols = _scaled(share(dims.num_heads, tensor, t, "num_attention_heads", "tensor"), dims.head_dim)
        return _column_split(self.hf, dims.hidden_size, cols)


class FeedForwardOutput(Row):
    """[H, F], its input columns split."""

    def hf_shapes(self, dims: Dimensions) -> dict[str, Shape]:
        return {self.hf: (dims.hidden_size, dims.intermediate_size)}

    def megatron_shard(self, dims: Dimensions, tensor: int, t: int) -> Shard:
        cols = share(dims.intermediate_size, tensor, t, "intermediate_size", "tensor")
        return _column_split(self.hf, dims.hidden_size, cols)


class GateUp(Row):
    """gate [F, H] and up [F, H] fused as [gate shard | up shard], at both ends."""

    def hf_shapes(self, dims: Dimensions) -> dict[str, Shape]:
        return {_part(self.hf, part): (dims.intermediate_size, dims.hidden_size) for part in ("gate", "up")}

    def megatron_shard(self, dims: Dimensions, tensor: int, t: int) -> Shard:
        rows = share(dims.intermediate_size, tensor, t, "intermediate_size", "tensor")
        parts = [(_part(self.hf, part), rows) for part in ("gate", "up")]
        return _stacked(parts, dims.hidden_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class QKV(Row):
    """q, k and v fused: Megatron interleaves them by query group, vLLM stacks [q shard | k shard | v shard]."""

    bias: bool = False

    def hf_shapes(self, dims: Dimensions) -> dict[str, Shape]:
        rest = () if self.bias else (dims.hidden_size,)
        heads = {"q": dims.num_heads, "k": dims.num_kv_heads, "v": dims.num_kv_heads}
        return {_part(self.hf, part): (n * dims.head_dim, *rest) for part, n in heads.items()}

    def megatron_shard(self, dims: Dimensions, tensor: int, t: int) -> Shard:
        """Query group after query group: its query heads, its key head, its value head."""
        if tensor > dims.num_kv_heads:
            raise ValueError(
                f"tensor={tensor} is larger than num_key_value_heads={dims.num_kv_heads}: Megatron would have to split "
                f"a query group, which is not modelled; choose tensor <= {dims.num_kv_heads}"
            )
        D = dims.head_dim
        heads = {"q": dims.num_heads // dims.num_kv_heads * D, "k": D, "v": D}
        groups = range(*share(dims.num_kv_heads, tensor, t, "num_key_value_heads", "tensor"))
        parts = [(_part(self.hf, part), (g * rows, (g + 1) * rows)) for g in groups for part, rows in heads.items()]
        return _stacked(parts, None if self.bias else dims.hidden_size)

    def vllm_shard(self, dims: Dimensions, tensor: int, t: int) -> Shard:
        """Where the axis is longer than the key-value heads, neighbours hold the same one."""
        q = share(dims.num_heads, tensor, t, "num_attention_heads", "tensor")
        heads = dims.num_kv_heads
        if tensor <= heads:
            kv = share(heads, tensor, t, "num_key_value_heads", "tensor")
        elif tensor % heads:
            raise ValueError(f"tensor={tensor} does not divide by num_key_value_heads={heads}")
        else:
            kv = share(heads, heads, t // (tensor // heads))
        spans = {"q": q, "k": kv, "v": kv}
        parts = [(_part(self.hf, part), _scaled(span, dims.head_dim)) for part, span in spans.items()]
        return _stacked(parts, None if self.bias else dims.hidden_size)


class Vocabulary(Row):
    """[V, H], its rows padded and then split; the padding is a region no block covers."""

    def hf_shapes(self, dims: Dimensions) -> dict[str, Shape]:
        return {} if dims.tied and self.tied_to else {self.hf: (dims.vocab_size, dims.hidden_size)}

    def megatron_shard(self, dims: Dimensions, tensor: int, t: int) -> Shard:
        return self._shard(dims, tensor, t, padded=rounded_up(dims.vocab_size, tensor))

    def vllm_shard(self, dims: Dimensions, tensor: int, t: int) -> Shard:
        return self._shard(dims, tensor, t, padded=rounded_up(dims.vocab_size, VLLM_VOCABULARY_MULTIPLE))

    def _shard(self, dims: Dimensions, tensor: int, t: int, padded: int) -> Shard:
        hf = self.tied_to if dims.tied and self.tied_to else self.hf
        start, stop = share(padded, tensor, t, "padded vocab_size", "tensor")
        rows = (start, min(stop, dims.vocab_size))
        blocks = (Block(hf, rows, (0, dims.hidden_size)),) if rows[0] < rows[1] else ()
        return Shard((stop - start, dims.hidden_size), blocks)


def rounded_up(n: int, multiple: int) -> int:
    """The least multiple of `multiple` that is not below n."""
    return -(-n // multiple) * multiple


def _part(hf: str, part: str) -> str:
    return hf.replace("{part}", part)


def _scaled(span: Span, factor: int) -> Span:
    return span[0] * factor, span[1] * factor


def _column_split(hf: str, height: int, cols: Span) -> Shard:
    return Shard((height, cols[1] - cols[0]), (Block(hf, (0, height), cols),))


def _stacked(parts: list[tuple[str, Span]], width: int | None) -> Shard:
    """The parts one below the other; a bias if `width` is None."""
    blocks, row = [], 0
    for hf, rows in parts:
        blocks.append(Block(hf, rows, None if width is None else (0, width), row))
        row += rows[1] - rows[0]
    return Shard((row,) if width is None else (row, width), tuple(blocks))
