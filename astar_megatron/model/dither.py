"""Dithered master weights: each float32 master starts at a random point of the interval that rounds to its weight.

Published weights lie on bfloat16's grid, so masters made from them do too, and an update reaches the bfloat16 weight
only after it has added up to half a step of the grid: on average 42 times a learning rate of 1e-5. With masters spread
evenly over their intervals a weight flips with probability update / step instead, and the mean update arrives from the
first step. The bfloat16 of each master is still the weight itself, so the policy begins as the reference, bit for bit.
examples/BFLOAT16.md shows the curves.

The point follows from the seed and the weight's place in the Hugging Face parameter alone: all layouts of ranks, all
replicas and both copies of a tied head have the same masters. Zeros and padding stay as they are.

Float32's bit patterns between two neighbours of the bfloat16 grid are 65,536 equal steps, of which those nearer than
half round to the weight. At a power of two the steps below are half as wide as those above, and so is the grid; that
both sides are drawn equally often is what keeps the mean update right there.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from conversion.families import Model
from conversion.tiles import ParallelLayout, Tile
from conversion.verify import GAMMA, shifted, splitmix64

_HALF = 1 << 15  # float32's steps in half a step of bfloat16
_BLOCK_ELEMENTS = 1 << 18


def dither_masters(
    optimizer: Any, parameters: Mapping[str, Tensor], model: Model, layout: ParallelLayout, rank: int, seed: int
) -> None:
    """Spread the float32 masters of a new optimizer over what rounds to the weights they were made from. Local.

    `optimizer` is Megatron's; `parameters` are this rank's of the model, under the names of `model.megatron_tiles`.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    tiles: dict[str, list[Tile]] = defaultdict(list)
    for tile in model.megatron_tiles(layout, [rank]):
        tiles[tile.name].append(tile)
    widths = {hf: shape[1] if len(shape) == 2 else 1 for hf, shape in model.parameters().items()}
    for inner in optimizer.chained_optimizers:
        for parameter, first, master in _masters(inner):
            assert master.dtype == torch.float32, f"a master weight in {master.dtype}"
            shard = master.detach().view(-1)
            columns = parameter.shape[1] if parameter.dim() == 2 else 1
            dither(shard, first, columns, tiles[names[id(parameter)]], widths, seed)


def dither(
    shard: Tensor, first: int, columns: int, tiles: Sequence[Tile], widths: Mapping[str, int], seed: int
) -> None:
    """Dither a shard [n] of a flattened local tensor in place: its elements from `first` on.

    The tensor has `columns` columns (1: a vector) and holds `tiles`; `widths` are the columns of whole HF parameters.
    The shard's values must be exact in bfloat16.
    """
    last = first + len(shard)
    height = max(1, _BLOCK_ELEMENTS // columns)  # rows at once
    for top in range(first // columns, -(-last // columns), height):  # all rows that the shard touches
        bottom = min(top + height, -(-last // columns))
        steps = _steps_of_rows(top, bottom, columns, tiles, widths, seed, shard.device).view(-1)
        start, stop = max(first, top * columns), min(last, bottom * columns)  # in the flattened tensor
        part = shard[start - first : stop - first]
        bits = part.view(torch.int32)  # a step of the pattern is the next float, away from zero
        bits += torch.where(part == 0, 0, steps[start - top * columns : stop - top * columns])


def _masters(inner: Any) -> Iterator[tuple[Tensor, int, Tensor]]:
    """Yield each parameter that this rank optimises, where its shard begins in it, and the shard's master."""
    for parameter, (group, order) in inner.model_param_group_index_map.items():
        shard = inner.optimizer.param_groups[group]["params"][order]
        # With offload the optimizer's groups hold the compute weights, and it keeps the masters in host memory.
        master = getattr(inner.optimizer, "param_to_fp32_param", {}).get(shard, shard)
        yield parameter, inner._get_model_param_range_map(parameter)["param"].start, master


def _steps_of_rows(
    top: int,
    bottom: int,
    columns: int,
    tiles: Sequence[Tile],
    widths: Mapping[str, int],
    seed: int,
    device: torch.device,
) -> Tensor:
    """Return [bottom - top, columns] int32: by how many steps of float32 each element of these local rows moves."""
    steps = torch.zeros(bottom - top, columns, dtype=torch.int32, device=device)
    for tile in tiles:
        # the local rows that both the block and the tile have
        start, stop = max(top, tile.row0), min(bottom, tile.row0 + tile.rows[1] - tile.rows[0])
        if start >= stop:
            continue
        cols = tile.cols or (0, 1)
        row, column = (  # in the HF parameter
            torch.arange(*span, device=device)
            for span in ((tile.rows[0] + start - tile.row0, tile.rows[0] + stop - tile.row0), cols)
        )
        place = row[:, None] * widths[tile.hf] + column  # [rows, columns], in the flattened HF parameter
        right = tile.col0 + cols[1] - cols[0]
        steps[start - top : stop - top, tile.col0 : right] = _random_steps(place, seed, tile.hf)
    return steps


def _random_steps(place: Tensor, seed: int, hf: str) -> Tensor:
    """Return evenly from -32767 to 32767 for each place of an HF parameter, int32 of the shape of `place` (int64)."""
    key = int.from_bytes(hashlib.sha256(f"{seed}\0dither\0{hf}".encode()).digest()[:8], "little", signed=True)
    high = shifted(splitmix64(place * GAMMA + key), 32)  # [0, 2^32); all modulo 2^64
    return ((high * (2 * _HALF - 1) >> 32) - (_HALF - 1)).to(torch.int32)  # [0, 2^32) to 65535 equal parts
