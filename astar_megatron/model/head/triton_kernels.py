"""Tiles of logits in Triton, for a GPU: the first product and the softmax's sums in one kernel, float32 in between.

The two products of the backward pass are the library's. Imported by backend.py's choice only; runs on a CPU through
Triton's interpreter, for tests.

Shapes: r rows, v columns of a tile, H hidden, n blocks of columns.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from astar_megatron.model.head.fused import Sums, Tile

LOGITS_BYTES = 1 << 31  # of the logits that may lie in memory, in the weight's type
_TILE_BYTES = 1 << 28  # of those that one product writes or reads
# Of the product, by the bytes of its factors' type: rows, columns, depth of a block, warps, stages.
_BLOCKS = {2: (128, 256, 64, 8, 3), 4: (64, 64, 32, 4, 2)}
_BAND = 16  # row blocks that are computed side by side
_GRADIENT_ROWS = 16


class TritonKernels:
    """See fused.Kernels. Refuses hidden sizes that the GPU's block loads can't take (16 bytes a row's multiple)."""

    def __init__(self, logits_bytes: int = LOGITS_BYTES) -> None:
        self._logits_bytes = logits_bytes

    def num_rows_kept(self, weight: Tensor) -> int:
        return self._logits_bytes // (weight.element_size() * weight.size(0))

    def width(self, num_rows: int, weight: Tensor, *, keep: bool) -> int:
        if not keep:
            return weight.size(0)  # no logits are written
        _, columns, *_ = _BLOCKS[weight.element_size()]
        fitting = min(self._logits_bytes, _TILE_BYTES) // (weight.element_size() * num_rows)
        return min(weight.size(0), max(1, fitting // columns) * columns)

    def sums(self, tile: Tile, *, keep: bool) -> Sums:
        hidden, weight = tile.hidden.contiguous(), tile.weight
        (r, depth), v = hidden.shape, len(weight)
        if depth * hidden.element_size() % 16:
            raise ValueError(
                f"head: expected a hidden size that fills a multiple of 16 bytes, got {depth} of {hidden.dtype}; "
                "use the chunked head"
            )
        rows, columns, inner, warps, stages = _BLOCKS[hidden.element_size()]
        num_blocks = _num_blocks(v, columns)
        partial = torch.empty(2, num_blocks, r, dtype=torch.float32, device=hidden.device)
        target = torch.zeros(r, dtype=torch.float32, device=hidden.device)
        kept = _aligned(r, v, hidden) if keep else None
        kernel: Any = _sums_kernel
        kernel[(num_blocks * _num_blocks(r, rows),)](
            TensorDescriptor.from_tensor(hidden, [rows, inner]),
            TensorDescriptor.from_tensor(weight, [columns, inner]),
            tile.targets,
            *partial,
            target,
            target if kept is None else kept,
            0 if kept is None else kept.stride(0),
            r,
            v,
            depth,
            tile.scale,
            ROWS=rows,
            COLUMNS=columns,
            INNER=inner,
            BAND=_BAND,
            KEEP=keep,
            PRECISION="ieee" if hidden.dtype == torch.float32 else "tf32",
            num_warps=warps,
            num_stages=stages,
        )
        return Sums(
            maxima=partial[0],
            totals=partial[1],
            target=target,
            kept=kept,
        )

    def gradient(self, tile: Tile, sums: Sums, normaliser: Tensor, slope: Tensor) -> Tensor:
        assert sums.kept is not None
        r, v = sums.kept.shape
        _, columns, *_ = _BLOCKS[sums.kept.element_size()]
        kernel: Any = _gradient_kernel
        kernel[(_num_blocks(v, columns), _num_blocks(r, _GRADIENT_ROWS))](
            sums.kept,
            sums.maxima,
            normaliser.contiguous(),
            slope.contiguous(),
            tile.targets,
            sums.kept.stride(0),
            r,
            v,
            ROWS=_GRADIENT_ROWS,
            COLUMNS=columns,
            num_warps=8,
        )
        return sums.kept


def _num_blocks(size: int, block: int) -> int:
    return -(-size // block)


def _aligned(r: int, v: int, like: Tensor) -> Tensor:
    """Return [r, v] whose rows begin at multiples of 16 bytes: the library's products are slow without."""
    unit = 16 // like.element_size()
    return torch.empty(r, _num_blocks(v, unit) * unit, dtype=like.dtype, device=like.device)[:, :v]


@triton.jit
def _block(program, r, v, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BAND: tl.constexpr):
    """A band of row blocks goes over all columns before the next one does: its hidden states stay in the cache."""
    programs_of_a_band = BAND * tl.cdiv(v, COLUMNS)
    band, within = program // programs_of_a_band, program % programs_of_a_band
    height = tl.minimum(BAND, tl.cdiv(r, ROWS) - band * BAND)
    return band * BAND + within % height, within // height


# One block of logits and what the softmax needs of it.
@triton.jit
def _sums_kernel(
    hidden,
    weight,
    targets,
    maxima,
    totals,
    target_logits,
    kept,
    kept_stride,
    r,
    v,
    depth,
    scale,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    BAND: tl.constexpr,
    KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row_block, column_block = _block(tl.program_id(0), r, v, ROWS, COLUMNS, BAND)  # pyright: ignore[reportGeneralTypeIssues]
    product = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, depth, INNER):
        a = hidden.load([row_block * ROWS, start])
        b = weight.load([column_block * COLUMNS, start])
        product = tl.dot(a, b.T, product, input_precision=PRECISION)
    rows = row_block * ROWS + tl.arange(0, ROWS)
    columns = column_block * COLUMNS + tl.arange(0, COLUMNS)
    real = columns[None, :] < v
    logits = tl.where(real, product * scale, float("-inf"))
    maximum = tl.max(logits, axis=1)
    exponentials = tl.exp(logits - maximum[:, None])
    inside = rows < r
    place = column_block * r + rows
    tl.store(maxima + place, maximum, mask=inside)
    tl.store(totals + place, tl.sum(exponentials, axis=1), mask=inside)
    target = tl.load(targets + rows, mask=inside, other=-1)
    hit = (target >= column_block * COLUMNS) & (target < tl.minimum(v, (column_block + 1) * COLUMNS))
    target_logit = tl.sum(tl.where(columns[None, :] == target[:, None], logits, 0.0), axis=1)
    tl.store(target_logits + rows, target_logit, mask=inside & hit)
    if KEEP:
        at = rows.to(tl.int64)[:, None] * kept_stride + columns[None, :]
        tl.store(kept + at, exponentials.to(kept.dtype.element_ty), mask=inside[:, None] & real)


@triton.jit
def _gradient_kernel(
    kept,
    maxima,
    normaliser,
    slope,
    targets,
    kept_stride,
    r,
    v,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """slope * (onehot - softmax) in place of exp(logit - maximum of the block)."""
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = rows < r
    slopes = tl.load(slope + rows, mask=inside, other=0.0)
    target = tl.load(targets + rows, mask=inside, other=-1)
    maximum = tl.load(maxima + tl.program_id(0) * r + rows, mask=inside, other=0.0)
    factor = tl.exp(maximum - tl.load(normaliser + rows, mask=inside, other=0.0))
    at = kept + rows.to(tl.int64)[:, None] * kept_stride + columns[None, :]
    mask = inside[:, None] & (columns[None, :] < v)
    softmax = tl.load(at, mask=mask, other=0.0).to(tl.float32) * factor[:, None]
    onehot = tl.where(columns[None, :] == target[:, None], 1.0, 0.0)
    tl.store(at, (slopes[:, None] * (onehot - softmax)).to(kept.dtype.element_ty), mask=mask)
