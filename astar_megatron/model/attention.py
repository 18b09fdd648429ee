"""Attention and rotary positions without Transformer Engine, for packs of sequences that may share one prefix.

A pack is one stream of T tokens: [prefix P | own part of sequence 0 | own part of sequence 1 | ...]; sequence b is the
prefix followed by its own part. Megatron's local attention knows neither packs nor shared prefixes; these two modules
replace its core attention and its rotary embedding. Transformer Engine's own, where used, don't share a prefix.

Where context-parallel ranks share the tokens (split.py), each takes its own queries to the keys and values of all: they
are gathered, and their gradients summed and scattered, once a layer. Leaves out: a ring, which would hold fewer of them
at a time; attention dropout.

Shapes: T packed tokens, t of them on this rank, P prefix tokens, B sequences, S longest own part, s of it on this rank,
h heads, g key-value heads, d head size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

_MAX_PADDING = 2.0  # one padded call for all sequences while it computes at most so many times their tokens


@dataclass
class PackedSequences(PackedSeqParams):
    """Where the sequences of a pack lie. Its format is not "thd": megatron then leaves [T, 1, h, d] tensors alone."""

    qkv_format: Any = "sbhd"
    position_ids: Any = None  # [t] within the sequence
    prefix_tokens: int = 0
    lengths: tuple[int, ...] = field(default_factory=tuple)  # own parts, whole
    order: Any = None  # [T], where each position lies in the context-parallel ranks' streams; None: in order, all here


class PackedRotaryEmbedding(RotaryEmbedding):
    """Rotary embedding by each token's own position instead of its place in the stream."""

    def get_rotary_seq_len(self, *args: Any, **kwargs: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        packed = kwargs.get("packed_seq_params", args[-1])
        return packed.position_ids

    def forward(self, positions: Tensor, **_: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return [T, 1, 1, d] angles of the [T] positions."""
        angles = torch.outer(positions.to(self.inv_freq.dtype), self.inv_freq.to(positions.device))  # [T, d / 2]
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]


class PackedAttention(MegatronModule):
    """Causal attention inside each sequence of a pack, over torch's scaled_dot_product_attention."""

    def __init__(self, config: Any, *_: Any, softmax_scale: float | None = None, **__: Any) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **kwargs: Any) -> Tensor:
        """Return [t, 1, h*d] of query [t, 1, h, d], key and value [t, 1, g, d]; `packed_seq_params` says the pack."""
        packed: PackedSequences = kwargs["packed_seq_params"]
        streams = [tensor.squeeze(1) for tensor in (query, key, value)]  # [t, h or g, d]
        if packed.order is not None:
            out = self._over_context(streams, packed)
        elif packed.prefix_tokens:
            out = self._with_prefix(streams, packed.prefix_tokens, packed.lengths)
        else:
            out = self._own_parts(streams, packed.lengths)
        return out.reshape(out.size(0), 1, -1)

    def _with_prefix(self, streams: list[Tensor], num_prefix: int, lengths: tuple[int, ...]) -> Tensor:
        query, key, value = (stream[:num_prefix].unsqueeze(0) for stream in streams)  # [1, P, ., d]
        prefix = self._attend([query, key, value], causal=True).squeeze(0)  # [P, h, d]
        own = [stream[num_prefix:] for stream in streams]
        return torch.cat((prefix, self._each(own, lengths, partial(self._after_prefix, key, value))))

    def _after_prefix(self, prefix_key: Tensor, prefix_value: Tensor, own: list[Tensor]) -> Tensor:
        """Return [B, S, h, d] of own parts [B, S, ., d] that follow a prefix [1, P, g, d]."""
        query, key, value = own
        batch, size, num_prefix = *query.shape[:2], prefix_key.size(1)
        key, value = (
            torch.cat((head.expand(batch, -1, -1, -1), tail), dim=1)
            for head, tail in ((prefix_key, key), (prefix_value, value))
        )  # [B, P + S, g, d]
        # [S, P + S]: row i sees the whole prefix and own tokens up to itself
        mask = torch.ones(size, num_prefix + size, dtype=torch.bool, device=query.device).tril(num_prefix)
        return self._attend([query, key, value], mask=mask)

    def _own_parts(self, streams: list[Tensor], lengths: tuple[int, ...]) -> Tensor:
        return self._each(streams, lengths, partial(self._attend, causal=True))

    def _each(
        self, streams: list[Tensor], lengths: tuple[int, ...], attend: Callable[[list[Tensor]], Tensor]
    ) -> Tensor:
        """Return what `attend` makes of [B, S, ., d] for all sequences at once, or one by one where padding is much."""
        if _pads_little(lengths):
            pad = _Padding(lengths, streams[0].device)
            return pad.gather(attend([pad.spread(stream) for stream in streams]))
        parts = zip(*(stream.split(lengths) for stream in streams), strict=True)
        return torch.cat([attend([x.unsqueeze(0) for x in part]).squeeze(0) for part in parts])

    def _over_context(self, streams: list[Tensor], packed: PackedSequences) -> Tensor:
        query, key, value = streams
        group = parallel_state.get_context_parallel_group()
        whole = gather_from_sequence_parallel_region(torch.cat((key, value), dim=-1), group=group)  # [T, g, 2d]
        key, value = whole.index_select(0, packed.order).chunk(2, dim=-1)  # from rank after rank to stream order
        return self.own_queries(query, key, value, packed)

    def own_queries(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences) -> Tensor:
        """Return [t, h, d] for this rank's part of the queries and all keys and values [T, g, d], in order."""
        lengths, num_ranks = packed.lengths, len(key) // max(1, len(query))
        shares = tuple(length // num_ranks for length in lengths)  # of each sequence here: all are padded to divide
        if _pads_little(lengths):
            pad, wide = _Padding(shares, query.device), _Padding(lengths, query.device)
            mask = _not_later(pad.spread(packed.position_ids), wide.shape[1]).unsqueeze(1)  # [B, 1, s, S]
            return pad.gather(self._attend([pad.spread(query), wide.spread(key), wide.spread(value)], mask=mask))
        parts = zip(
            *(stream.split(shares) for stream in (query, packed.position_ids)),
            *(stream.split(lengths) for stream in (key, value)),
            strict=True,
        )
        outputs = [
            self._attend([x.unsqueeze(0) for x in (q, k, v)], mask=_not_later(positions, len(k))).squeeze(0)
            for q, positions, k, v in parts
        ]
        return torch.cat(outputs)

    def _attend(self, tensors: list[Tensor], *, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """Return [B, S, h, d]. Padding comes after the real tokens, so a causal mask hides it from them."""
        query, key, value = (tensor.transpose(1, 2) for tensor in tensors)
        grouped = query.size(1) != key.size(1)
        out = scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal, scale=self.scale, enable_gqa=grouped
        )
        return out.transpose(1, 2)

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        return {}


def _pads_little(lengths: tuple[int, ...]) -> bool:
    return len(lengths) * max(lengths) <= _MAX_PADDING * sum(lengths)


def _not_later(positions: Tensor, size: int) -> Tensor:
    """Return [..., size], True for the keys that a query at one of `positions` [...] may see."""
    return positions.unsqueeze(-1) >= torch.arange(size, device=positions.device)


class _Padding:
    """Between a stream of sequences [sum(lengths), ...] and the same padded to [B, S, ...]."""

    def __init__(self, lengths: tuple[int, ...], device: torch.device) -> None:
        self.shape = (len(lengths), max(lengths))
        sizes = torch.tensor(lengths, device=device)
        slots = torch.arange(self.shape[1], device=device).expand(self.shape)  # [B, S]
        self.places = (slots < sizes[:, None]).flatten().nonzero().squeeze(1)  # where each stream token lies

    def spread(self, stream: Tensor) -> Tensor:
        padded = stream.new_zeros((self.shape[0] * self.shape[1], *stream.shape[1:]))  # [B * S, ...]
        return padded.index_copy(0, self.places, stream).unflatten(0, self.shape)

    def gather(self, padded: Tensor) -> Tensor:
        return padded.flatten(0, 1).index_select(0, self.places)
