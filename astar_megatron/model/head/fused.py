"""The head without [R, V] logits: tiles of them, made by one of two sets of kernels (chunked.py, triton_kernels.py).

The log-prob of a target is its logit minus ln of the sum of exp over the vocabulary; tiles and tensor-parallel ranks
bring partial sums, each with the maximum it was taken relative to. The gradient of sum_i c_i ln p_i is
c_i (onehot - p) / temperature for each row of logits. `sequence_loss` takes as many sequences at a time as the kernels
keep logits for, learns their c from the loss, and forms their gradient at once, in the forward pass: three matrix
products. The backward pass only scales it. A sequence that is too long for that has its tiles made again, in the same
place: four.

`token_logprobs` and `sequence_loss` see tiles of the same sizes for the same pack, with and without gradients: policy
and reference with the same weights have bitwise the same log-probs.

Shapes: R response positions, r rows of one group of sequences, v columns of one tile, H hidden, V columns of the rank.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

from astar_megatron.model.head.interface import Responses, SequenceLoss, Vocabulary, check
from astar_megatron.model.head.ranks import reduced, shared


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """What one tile of logits is made of: scale * hidden @ weight.T."""

    hidden: Tensor  # [r, H]
    weight: Tensor  # [v, H], no padding
    targets: Tensor  # [r] column in this tile; outside 0..v-1 if the target is in another
    scale: float  # 1 / temperature


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """What the softmax needs to know of one or more tiles; n partial sums a row."""

    maxima: Tensor  # [n, r], or another number of the size of the logits that the sums are relative to
    totals: Tensor  # [n, r], of exp(logit - maximum)
    target: Tensor  # [r], the target's logit, 0 where the target is not in these tiles
    kept: Tensor | None = None  # [r, v] exp(logit - maximum) of one tile


class Kernels(Protocol):
    """How tiles are computed."""

    def num_rows_kept(self, weight: Tensor) -> int:
        """Return how many rows of logits over the whole [V, H] weight may lie in memory."""
        ...

    def width(self, num_rows: int, weight: Tensor, *, keep: bool) -> int:
        """Return the columns of one tile of `num_rows` rows; equal with and without `keep` if rounding needs that."""
        ...

    def sums(self, tile: Tile, *, keep: bool) -> Sums: ...

    def gradient(self, tile: Tile, sums: Sums, normaliser: Tensor, slope: Tensor) -> Tensor:
        """Return slope * (onehot - softmax) [r, v] for the matrix products, in place of `sums.kept`."""
        ...


class FusedHead:
    """See interface.Head."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels

    def token_logprobs(self, hidden: Tensor, weight: Tensor, responses: Responses, vocabulary: Vocabulary) -> Tensor:
        check(hidden, weight, responses, vocabulary)
        work = _Work(self._kernels, weight, responses, vocabulary)
        logprobs = [work.forward(hidden, weight, group).logprobs for group in work.groups]
        return torch.cat(logprobs) if logprobs else torch.zeros(0, device=hidden.device)

    def sequence_loss(
        self, hidden: Tensor, weight: Tensor, responses: Responses, vocabulary: Vocabulary, loss: SequenceLoss
    ) -> Tensor:
        check(hidden, weight, responses, vocabulary)
        work = _Work(self._kernels, weight, responses, vocabulary)
        return _SequenceLoss.apply(shared(hidden, vocabulary.group), weight, work, loss)  # type: ignore[return-value]


class _SequenceLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, work: "_Work", loss: SequenceLoss) -> Tensor:
        gradients = _Gradients(hidden, weight, several=len(work.groups) > 1)
        total = torch.zeros((), device=hidden.device)
        for group in work.groups:
            total += _SequenceLoss.of_group(hidden, weight, work, loss, group, gradients)
        ctx.gradients = gradients.finished()
        return total

    @staticmethod
    def backward(ctx: Any, *scales: Any) -> Any:
        assert ctx.gradients is not None, "the gradient was formed once and is given once: no retain_graph here"
        hidden, weight = ctx.gradients
        ctx.gradients = None
        return hidden.mul_(scales[0]), weight.mul_(scales[0]), None, None

    @staticmethod
    def of_group(
        hidden: Tensor, weight: Tensor, work: "_Work", loss: SequenceLoss, group: "Group", gradients: "_Gradients"
    ) -> Tensor:
        """Return the group's summed loss; its gradient is added, and its logits are gone, when this returns."""
        done = work.forward(hidden, weight, group, keep=group.fits)
        losses, slopes = _losses_and_slopes(loss, group.sequences, done.logprobs)
        work.backward(hidden, weight, group, done.kept, done.normaliser, slopes, gradients)
        return losses.sum()


def _losses_and_slopes(loss: SequenceLoss, sequences: slice, logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the losses [b] and the derivatives of their sum by the log-probs [r]."""
    with torch.enable_grad():
        logprobs = logprobs.detach().requires_grad_()
        losses = loss(sequences, logprobs)
        (slopes,) = torch.autograd.grad(losses.sum(), logprobs)
    return losses.detach(), slopes


@dataclass(frozen=True, slots=True)
class Group:
    """Consecutive sequences of a pack that are computed together, and their rows."""

    sequences: slice
    rows: slice
    fits: bool  # their logits may be kept


def groups(lengths: tuple[int, ...], num_rows_kept: int, most: tuple[int, ...] | None = None) -> Iterator[Group]:
    """Yield all sequences in order: as many at a time as `num_rows_kept` rows hold; a longer one alone.

    `most` are the lengths that decide it, if not these.
    """
    first = start = end = taken = 0
    for index, (length, counted) in enumerate(zip(lengths, most or lengths, strict=True)):
        if index > first and taken + counted > num_rows_kept:
            yield Group(slice(first, index), slice(start, end), taken <= num_rows_kept)
            first, start, taken = index, end, 0
        end += length
        taken += counted
    if lengths:
        yield Group(slice(first, len(lengths)), slice(start, end), taken <= num_rows_kept)


class _Done(NamedTuple):
    """The forward pass of a group."""

    logprobs: Tensor  # [r]
    normaliser: Tensor  # [r]
    kept: list[Sums] | None  # of each tile


class _Work:
    """One pack's way through the kernels."""

    def __init__(self, kernels: Kernels, weight: Tensor, responses: Responses, vocabulary: Vocabulary) -> None:
        self.responses, self._kernels, self._vocabulary = responses, kernels, vocabulary
        # Of the padded weight, whose size all ranks share: they must form the same groups.
        self.groups = list(groups(responses.lengths, kernels.num_rows_kept(weight), responses.most))

    def forward(self, hidden: Tensor, weight: Tensor, group: Group, *, keep: bool = False) -> _Done:
        tile_sums = []
        for _, tile in self._tiles(hidden, weight, group, keep=keep):
            tile_sums.append(self._kernels.sums(tile, keep=keep))
        if not tile_sums:  # no rows, or no tokens on this rank
            tile_sums = [_no_sums(group.rows.stop - group.rows.start, hidden.device)]
        return _Done(*_merged(tile_sums, self._vocabulary.group), tile_sums if keep else None)

    def backward(
        self,
        hidden: Tensor,
        weight: Tensor,
        group: Group,
        kept: list[Sums] | None,
        normaliser: Tensor,
        slopes: Tensor,
        gradients: "_Gradients",
    ) -> None:
        """Add the gradient of sum_i slopes_i * logprob_i over the group's rows i to `gradients`."""
        slopes = slopes / self._vocabulary.temperature
        for index, (columns, tile) in enumerate(self._tiles(hidden, weight, group, keep=True)):
            sums = kept[index] if kept else self._kernels.sums(tile, keep=True)
            gradients.add(group.rows, columns, tile, self._kernels.gradient(tile, sums, normaliser, slopes))
            del sums  # or two tiles would lie in memory while the next is made
        gradients.is_fresh &= group.rows.start == group.rows.stop

    def _tiles(self, hidden: Tensor, weight: Tensor, group: Group, *, keep: bool) -> Iterator[tuple[slice, Tile]]:
        rows = hidden.detach()[group.rows]
        real = weight.detach()[: self._vocabulary.real_columns(weight)]
        targets = self.responses.targets[group.rows] - self._vocabulary.first_column
        if not len(rows):
            return
        width = self._kernels.width(len(rows), weight, keep=keep)
        for start in range(0, len(real), width):
            columns = slice(start, min(start + width, len(real)))
            yield (
                columns,
                Tile(
                    hidden=rows,
                    weight=real[columns],
                    targets=targets - start,
                    scale=1.0 / self._vocabulary.temperature,
                ),
            )


class _Gradients:
    """The gradients of hidden states and weight while they are summed over groups and tiles."""

    def __init__(self, hidden: Tensor, weight: Tensor, *, several: bool) -> None:
        self._dtype = weight.dtype
        self._hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        once = not several and weight.device.type != "cpu"  # every row is written by one product
        self._weight = torch.empty(weight.shape, dtype=weight.dtype if once else torch.float32, device=weight.device)
        self._num_columns = 0  # written so far: padding never is
        self.is_fresh = True  # no group has been added

    def add(self, rows: slice, columns: slice, tile: Tile, gradient: Tensor) -> None:
        """Add what the gradient [r, v] of a tile's logits makes of hidden states and weight."""
        add_product(self._hidden[rows], gradient, tile.weight)
        add_product(self._weight[columns], gradient.t(), tile.hidden, fresh=self.is_fresh)
        self._num_columns = max(self._num_columns, columns.stop)

    def finished(self) -> tuple[Tensor, Tensor]:
        self._weight[self._num_columns :].zero_()
        return self._hidden.to(self._dtype), self._weight.to(self._dtype)


def add_product(out: Tensor, a: Tensor, b: Tensor, *, fresh: bool = False, scale: float = 1.0) -> None:
    """Add scale * a @ b to `out`, float32 or the factors' type, summing in float32; `fresh` overwrites it instead."""
    beta = 0.0 if fresh else 1.0
    if a.device.type == "cpu":
        a, b = a.float(), b.float()  # a CPU's bfloat16 product rounds its result to bfloat16
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=beta, alpha=scale, out=out)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, alpha=scale, out=out)  # type: ignore[call-overload]


def _merged(tile_sums: list[Sums], group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Return log-probs and normalisers [r] of all tiles of all ranks."""
    maxima = torch.cat([sums.maxima for sums in tile_sums])  # [n, r]
    maximum = reduced(maxima.amax(0), group, ReduceOp.MAX)
    factors = maxima.sub_(maximum).exp_()
    parts = [
        torch.cat([sums.totals for sums in tile_sums]).mul_(factors).sum(0),
        torch.stack([sums.target for sums in tile_sums]).sum(0),
    ]
    total, target = reduced(torch.stack(parts), group)
    normaliser = maximum + total.log()
    return target - normaliser, normaliser


def _no_sums(num_rows: int, device: torch.device) -> Sums:
    zeros = torch.zeros(1, num_rows, device=device)
    return Sums(maxima=torch.full_like(zeros, -math.inf), totals=zeros, target=torch.zeros_like(zeros[0]))
