"""Which layouts of Megatron ranks a model, a mini-batch and a machine allow; others are refused by name.

Imports no Megatron. That the data axis divides the mini-batch is checked before (config.py).
"""

import math
from collections.abc import Iterator
from itertools import product

from astar_megatron.config import ParallelConfig
from conversion.families import Model
from conversion.tiles import ParallelLayout

_AXES = ("tensor", "pipeline", "virtual", "context", "data", "expert")
_NUM_NAMED = 3


class LayoutError(ValueError):
    """A layout that can't run; the message names the number that does not fit, and the nearest layouts that would."""


def layout_of(parallel: ParallelConfig, *, fused_norms: bool) -> ParallelLayout:
    """Return how the configured ranks hold a model; `fused_norms` as in ParallelLayout."""
    sizes = {axis: getattr(parallel, axis) for axis in _AXES}
    return ParallelLayout(fused_norms=fused_norms, **sizes)


def check(
    parallel: ParallelConfig, model: Model, *, sequences: int, available: int | None = None, resources: str = ""
) -> None:
    """Raise LayoutError unless `parallel` divides the model and has no more ranks than are `available` (None: many).

    `sequences` are those of an optimiser step; `resources` says in words what is available.
    """
    problem, size = _problem(parallel, model, sequences), parallel.world_size
    if problem is None and available is not None and size > available:
        problem = f"{described(parallel)} makes {size} ranks, and this machine has room for {available}: {resources}"
        size = available
    if problem is None:
        return
    if size < 1:
        raise LayoutError(f"parallel: {problem}")
    nearest = _nearest(parallel, model, sequences=sequences, world_size=size)
    fitting = "; ".join(described(layout) for layout in nearest)
    raise LayoutError(f"parallel: {problem}. The nearest layouts of up to {size} ranks that fit: {fitting}")


def _problem(parallel: ParallelConfig, model: Model, sequences: int) -> str | None:
    """Return what of the model, of the optimiser step or of another axis the layout does not divide."""
    if parallel.expert > 1 and not model.dims.num_experts:
        return f"expert={parallel.expert}, but {model.architecture} has no experts"
    own = sequences // parallel.data
    if parallel.virtual > 1 and own % parallel.pipeline:
        return (
            f"virtual={parallel.virtual}: interleaved stages take micro-batches pipeline={parallel.pipeline} at a time "
            f"and the {own} sequences of a rank's optimiser step (train.mini_batch_size / data) are no multiple of it"
        )
    try:
        layout = layout_of(parallel, fused_norms=False)
        model.megatron_shapes(layout, 0)
    except ValueError as error:
        return str(error).partition("; ")[0]  # what follows is advice for this size alone; others may refuse it
    return None


def _nearest(parallel: ParallelConfig, model: Model, *, sequences: int, world_size: int) -> list[ParallelConfig]:
    """Return the layouts with most ranks, up to `world_size`, that fit; of those the ones most like `parallel`."""
    for size in range(world_size, 0, -1):
        layouts = _layouts(size, parallel, sequences)
        if fitting := [layout for layout in layouts if _problem(layout, model, sequences) is None]:
            return sorted(fitting, key=lambda layout: _distance(layout, parallel))[:_NUM_NAMED]
    raise AssertionError("a layout of one rank fits every model")


def _layouts(world_size: int, like: ParallelConfig, sequences: int) -> Iterator[ParallelConfig]:
    """Yield the layouts of `world_size` ranks whose axes divide each other and the `sequences` of a step."""
    divisors = [d for d in range(1, world_size + 1) if world_size % d == 0]
    for tensor, pipeline, context in product(divisors, repeat=3):
        data, rest = divmod(world_size, tensor * pipeline * context)
        if rest or sequences % data:
            continue
        for virtual in sorted({1, 2, like.virtual}) if pipeline > 1 and sequences // data % pipeline == 0 else (1,):
            for expert in (d for d in divisors if context * data % d == 0):
                axes = {"tensor": tensor, "pipeline": pipeline, "virtual": virtual, "context": context, "data": data}
                yield like.model_copy(update=axes | {"expert": expert})


def _distance(layout: ParallelConfig, other: ParallelConfig) -> float:
    return sum(abs(math.log(getattr(layout, axis) / getattr(other, axis))) for axis in _AXES)


def described(parallel: ParallelConfig) -> str:
    """Return the axes that are longer than one, in words."""
    axes = [f"{axis}={getattr(parallel, axis)}" for axis in _AXES if getattr(parallel, axis) > 1]
    return " ".join(axes) or "one rank"
