"""Dithered masters: they round to their weights, fill the interval evenly, and let the mean update arrive."""

import math

import pytest
import torch
from torch import Tensor

from astar_megatron.model.dither import dither
from conversion.tiles import Tile

NAME = "model.layers.0.mlp.down_proj.weight"


def dithered(weight: Tensor, seed: int = 0) -> Tensor:
    """The masters of a whole HF matrix."""
    rows, columns = weight.shape
    masters = weight.float().clone()
    tile = Tile(0, "local", NAME, (0, rows), (0, columns))
    dither(masters.view(-1), 0, columns, [tile], {NAME: columns}, seed)
    return masters


def random_weight(rows: int, columns: int) -> Tensor:
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(5)) * 0.1).bfloat16()


def test_every_master_rounds_to_its_weight_and_zeros_stay() -> None:
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(256, 256)
    weight = torch.where(patterns.isfinite(), patterns, 0.0)  # all that bfloat16 has
    for seed in range(5):
        masters = dithered(weight, seed)
        assert torch.equal(masters.bfloat16().view(torch.int16), weight.view(torch.int16))
        assert torch.equal(masters[weight == 0], weight[weight == 0].float())
        assert (masters != weight.float()).float().mean() > 0.98


def test_masters_fill_their_interval_evenly_and_on_both_sides_alike() -> None:
    weight = random_weight(1000, 1000)
    steps = dithered(weight).view(torch.int32) - weight.float().view(torch.int32)
    place = (steps.double() + 32767.5) / 65535  # in the interval, from 0 to 1
    counts = torch.histc(place, bins=64, min=0, max=1)
    chi_squared = float(((counts - 1e6 / 64) ** 2 / (1e6 / 64)).sum())
    assert chi_squared < 63 + 6 * math.sqrt(2 * 63)
    assert float(place.mean()) == pytest.approx(0.5, abs=6 / math.sqrt(12 * 1e6))
    neighbours = torch.corrcoef(torch.stack([place[:, :-1].flatten(), place[:, 1:].flatten()]))[0, 1]
    assert abs(float(neighbours)) < 6e-3


def test_seeds_and_names_draw_other_points() -> None:
    weight = random_weight(64, 48)
    first, same, other = dithered(weight), dithered(weight), dithered(weight, seed=1)
    assert torch.equal(first, same)
    assert (first != other).float().mean() > 0.99


@pytest.mark.parametrize("columns", [1, 7, 600])
def test_a_shard_of_a_piece_has_the_points_of_the_whole(columns: int) -> None:
    """A rank's piece of a matrix, fused below something else and padded, of which a replica optimises a part."""
    rows = 1301
    whole = dithered(random_weight(rows, columns))
    top, left, height, width = 40, columns // 3, 1200, columns - columns // 3
    local = torch.zeros(height + 9, width + 2 if columns > 1 else 1)
    local[4 : 4 + height, :width] = random_weight(rows, columns).float()[top : top + height, left:]
    local[-5:] = 1.0  # padding: no tile covers it
    tile = Tile(0, "local", NAME, (top, top + height), (left, columns) if columns > 1 else None, row0=4)
    start, stop = local.numel() // 5 + 1, local.numel() - 3
    shard = local.flatten()[start:stop].clone()
    dither(shard, start, local.shape[1], [tile], {NAME: columns}, 0)
    wanted = local.clone()
    wanted[4 : 4 + height, :width] = whole[top : top + height, left:]
    assert torch.equal(shard, wanted.flatten()[start:stop])


@pytest.mark.parametrize("lr", [1e-5, 1e-6])
@pytest.mark.parametrize("signs", ["agree", "random"])
def test_the_mean_change_of_bfloat16_weights_is_a_float32_twins(lr: float, signs: str) -> None:
    """Adam on the same gradients; each change is measured along the twin's, so that signs do not cancel."""
    weight = random_weight(1024, 1024)
    generator = torch.Generator().manual_seed(7)
    fixed = torch.randn(weight.shape, generator=generator)
    masters = {"twin": weight.float(), "dithered": dithered(weight)}
    parameters = [torch.nn.Parameter(tensor) for tensor in masters.values()]
    adam = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    for _ in range(12):
        gradient = fixed if signs == "agree" else torch.randn(weight.shape, generator=generator)
        for parameter in parameters:
            parameter.grad = gradient
        adam.step()
    twin, own = (parameter.detach() for parameter in parameters)
    update = (twin - weight.float()).double()
    along = update.sign()
    arrived = (own.bfloat16().float() - weight.float()).double() * along
    without = (twin.bfloat16().float() - weight.float()).double() * along
    error = float((arrived - update.abs()).std()) / math.sqrt(weight.numel())
    assert abs(float(arrived.mean() - update.abs().mean())) < 4 * error
    assert error < 0.1 * float(update.abs().mean())  # so it could have been seen
    # 12 steps of 1e-5 are a quarter of half an interval at the rms weight, 12 random ones a tenth.
    assert float(without.mean()) < (0.3 if lr == 1e-5 else 0.05) * float(update.abs().mean())


def test_the_mean_change_is_right_at_powers_of_two_too() -> None:
    """There the grid below is half as fine as above: both sides of the interval must be drawn equally often."""
    weight = torch.full((1000, 1000), 0.125).bfloat16()
    weight[::2] *= -1
    step = 2.0**-10  # from 0.125 to its neighbour above
    masters = dithered(weight)
    for change in (0.03 * step, -0.03 * step):
        arrived = ((masters + change).bfloat16().float() - weight.float()).double()
        assert float(arrived.mean()) == pytest.approx(change, abs=4 * float(arrived.std()) / 1000)
