"""Tiles of logits in plain torch, on any device: what a machine without Triton computes with.

Shapes: r rows, v columns of a tile, V columns of the rank.
"""

import torch
from torch import Tensor

from astar_megatron.model.head import CPU_LOGITS_BYTES, GPU_LOGITS_BYTES
from astar_megatron.model.head.fused import Sums, Tile, add_product

_CPU_WIDTH = 2048  # of a tile: its softmax finds it in the cache


class TorchKernels:
    """See fused.Kernels."""

    def __init__(self, logits_bytes: int | None = None) -> None:
        self._logits_bytes = logits_bytes

    def num_rows_kept(self, weight: Tensor) -> int:
        return self._num_logits(weight) // weight.size(0)

    def width(self, num_rows: int, weight: Tensor, *, keep: bool) -> int:
        widest = _CPU_WIDTH if weight.device.type == "cpu" else weight.size(0)
        return max(1, min(widest, self._num_logits(weight) // num_rows))

    def _num_logits(self, weight: Tensor) -> int:
        default = CPU_LOGITS_BYTES if weight.device.type == "cpu" else GPU_LOGITS_BYTES
        return (self._logits_bytes or default) // 4

    def sums(self, tile: Tile, *, keep: bool) -> Sums:
        shape = len(tile.hidden), len(tile.weight)
        logits = torch.empty(shape, dtype=torch.float32, device=tile.hidden.device)
        add_product(logits, tile.hidden, tile.weight.t(), fresh=True, scale=tile.scale)
        column, here = _target_column(tile)
        target = torch.where(here, logits.gather(1, column).squeeze(1), 0.0)
        maxima = logits.amax(1)
        # torch's softmax is one pass, with a faster exp than torch.exp; its largest entry is 1 / the sum.
        softmax = torch.softmax(logits, 1, out=logits)
        normaliser = maxima.sub_(softmax.amax(1).log_()).unsqueeze(0)  # of this tile, which stands for its maximum
        return Sums(
            maxima=normaliser,
            totals=torch.ones_like(normaliser),
            target=target,
            kept=softmax if keep else None,
        )

    def gradient(self, tile: Tile, sums: Sums, normaliser: Tensor, slope: Tensor) -> Tensor:
        assert sums.kept is not None
        column, here = _target_column(tile)
        factor = -slope * (sums.maxima[0] - normaliser).exp()
        gradient = sums.kept.mul_(factor.unsqueeze(1))
        gradient.scatter_add_(1, column, torch.where(here, slope, 0.0).unsqueeze(1))
        return gradient if gradient.device.type == "cpu" else gradient.to(tile.weight.dtype)


def _target_column(tile: Tile) -> tuple[Tensor, Tensor]:
    """Return the targets' columns [r, 1], any column for a target of another tile, and which are in this one [r]."""
    last = len(tile.weight) - 1
    return tile.targets.clamp(0, last).unsqueeze(1), (tile.targets >= 0) & (tile.targets <= last)
