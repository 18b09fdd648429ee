"""The Megatron end: a check that a rank's tensors are the ones its layout describes. Imports no Megatron.

A Megatron model's parameters are plain tensors under the names of `Model.megatron_tiles`, so plans fill and read them
directly; what is left to do at this end is to be sure of that before weights move.
"""

from collections.abc import Mapping

from torch import Tensor

from conversion.families import Model
from conversion.tiles import ParallelLayout


def check_tensors(model: Model, layout: ParallelLayout, rank: int, tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError, naming the first difference, unless `tensors` are what `rank` holds in `layout`."""
    expected = model.megatron_shapes(layout, rank)
    for name in [*expected, *(name for name in tensors if name not in expected)]:
        shape = tuple(tensors[name].shape) if name in tensors else None
        if shape != expected.get(name):
            raise ValueError(
                f"{name} on rank {rank} of {layout}: "
                f"expected {expected.get(name) or 'no such tensor'}, got {shape or 'no such tensor'}"
            )
