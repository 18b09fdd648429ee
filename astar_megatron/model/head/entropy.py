"""Entropies from tiles of logits, to float32's digits however peaked a distribution is.

With m the largest logit, g = logit - m, x the sum of exp(g) without that of one largest, and w = sum of g exp(g), the
entropy is ln(1 + x) - w / (1 + x): two terms of one sign. The normaliser minus the mean logit would be the small
difference of two large numbers where one token has nearly all of the probability.

Shapes: r rows, v columns of a tile, n tiles.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

from astar_megatron.model.head.ranks import reduced

_LEAST = -1e4  # of g: its exp is 0 as that of minus infinity is, and so is their product


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """What the entropy needs to know of one or more tiles."""

    maxima: Tensor  # [n, r] m; minus infinity where a rank has no columns
    excess: Tensor  # [n, r] x
    weighted: Tensor  # [n, r] w


def spread(logits: Tensor) -> Spread:
    """Return that of one tile [r, v]."""
    maxima = logits.amax(1)
    gaps = (logits - maxima.unsqueeze(1)).clamp_(min=_LEAST)
    exponentials, largest = gaps.exp(), gaps == 0
    weighted = (gaps * exponentials).sum(1)
    excess = exponentials.masked_fill_(largest, 0.0).sum(1) + (largest.sum(1) - 1)
    return Spread(maxima=maxima[None], excess=excess[None], weighted=weighted[None])


def entropies(found: Sequence[Spread], group: ProcessGroup | None) -> Tensor:
    """Return the entropies [r] (nats) over all tiles of all ranks."""
    maxima, excess, weighted = (
        torch.cat([getattr(one, name) for one in found]) for name in ("maxima", "excess", "weighted")
    )
    gaps = maxima.sub_(reduced(maxima.amax(0), group, ReduceOp.MAX)).clamp_(min=_LEAST)
    factors, largest = gaps.exp(), gaps == 0
    parts = [
        (factors * torch.where(largest, excess, 1 + excess)).sum(0),
        largest.sum(0).to(excess.dtype),  # each of these counts 1 more, but for the one that is left out
        (factors * (weighted + gaps * (1 + excess))).sum(0),
    ]
    excess, count, weighted = reduced(torch.stack(parts), group)
    excess = excess + (count - 1)
    return excess.log1p() - weighted / (1 + excess)
