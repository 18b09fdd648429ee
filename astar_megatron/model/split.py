"""What of a pack's stream one rank holds, where the ranks of two axes share its tokens. Pure: no collective here.

- `tensor`: between the matrices each rank holds an equal run of tokens (sequence parallelism), so their number must
  divide by the axis. Megatron splits and joins them itself; the stream only gets padding at its end.
- `context`: each rank holds 2 of 2 * context equal pieces of every sequence, the r-th from the front and the r-th from
  the back, so that all have the same work in causal attention. It is the split of Transformer Engine's attention, too.

Padding is tokens behind the last of a sequence: causal attention hides them from the others, no response lies there,
and so they change no number. A pack without any token gets some: Megatron's layers take no empty stream. Sequences of
a pack that is split by `context` share no prefix.

Shapes: T positions of the padded stream, t of them held here, R responses of the pack, r of them here, B sequences.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from astar_megatron.algorithm.packing import PackedBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStream:
    """A rank's part of a pack. Position `positions[i]` predicts `targets[i]`, which is target `rows[i]` of the pack."""

    token_ids: Tensor  # [t] int64
    position_ids: Tensor  # [t] int64, within the sequence
    prefix_tokens: int  # that all sequences share
    lengths: tuple[int, ...]  # own parts of the B sequences, whole and padded
    order: Tensor | None  # [T], where in the ranks' streams, one behind the other, each position lies; None: one rank
    positions: Tensor  # [r] int64, in this rank's stream
    targets: Tensor  # [r] int64
    rows: Tensor  # [r] int64
    num_responses: int  # R
    response_lengths: tuple[int, ...]  # of the B sequences, here
    most_responses: tuple[int, ...]  # of the B sequences, on whichever rank of the context axis has most


def rank_stream(packed: PackedBatch, *, tensor: int = 1, context: int = 1, rank: int = 0, align: int = 1) -> RankStream:
    """Return what the context-parallel `rank` holds of a pack, whose tokens `tensor` * `context` ranks share.

    Every rank's part is a multiple of `align` tokens.
    """
    assert not (context > 1 and packed.prefix_tokens), "a shared prefix can't be split over context-parallel ranks"
    lengths = _padded(packed, context, tensor * context * align)
    token_ids, position_ids = _streams(packed, lengths)
    owner = _owners(lengths, packed.prefix_tokens, context)  # [T]
    positions = torch.cat([(owner == r).nonzero().squeeze(1) for r in range(context)])  # [T], rank after rank
    order = torch.empty_like(positions)
    order[positions] = torch.arange(len(positions))
    size = len(positions) // context
    mine = positions[rank * size : (rank + 1) * size]

    padding = torch.tensor([new - old for new, old in zip(lengths, packed.lengths, strict=True)])  # [B]
    targets = packed.target_positions + (padding.cumsum(0) - padding)[packed.sequence]  # [R], in the padded stream
    counts = [packed.sequence[owner[targets] == r].bincount(minlength=packed.num_sequences) for r in range(context)]
    rows = (owner[targets] == rank).nonzero().squeeze(1)
    return RankStream(
        token_ids=token_ids[mine],
        position_ids=position_ids[mine],
        prefix_tokens=packed.prefix_tokens,
        lengths=lengths,
        order=order if context > 1 else None,
        positions=order[targets[rows]] - rank * size,
        targets=packed.targets[rows],
        rows=rows,
        num_responses=len(packed.targets),
        response_lengths=tuple(counts[rank].tolist()),
        most_responses=tuple(torch.stack(counts).amax(0).tolist()),
    )


def _padded(packed: PackedBatch, context: int, multiple: int) -> tuple[int, ...]:
    """Return the lengths of the sequences' own parts with padding; what the whole stream lacks gets the last."""
    piece = 2 * context if context > 1 else 1
    lengths = [-(-length // piece) * piece for length in packed.lengths]
    total = packed.prefix_tokens + sum(lengths)
    whole = math.lcm(piece, multiple)
    lengths[-1] += -total % whole if total else whole
    return tuple(lengths)


def _streams(packed: PackedBatch, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return token and position ids [T] of the padded stream; padding is token 0 at the positions that follow."""
    head = packed.prefix_tokens
    token_ids, position_ids = [packed.token_ids[:head]], [packed.position_ids[:head]]
    for ids, length in zip(packed.token_ids[head:].split(packed.lengths), lengths, strict=True):
        token_ids += [ids, ids.new_zeros(length - len(ids))]
        position_ids.append(torch.arange(head, head + length))
    return torch.cat(token_ids), torch.cat(position_ids)


def _owners(lengths: tuple[int, ...], prefix_tokens: int, context: int) -> Tensor:
    """Return the context-parallel rank [T] of each position of the padded stream."""
    if context == 1:
        return torch.zeros(prefix_tokens + sum(lengths), dtype=torch.int64)
    pieces = torch.arange(2 * context)
    ranks = torch.minimum(pieces, 2 * context - 1 - pieces)
    return torch.cat([ranks.repeat_interleave(length // (2 * context)) for length in lengths])
