"""Which layouts of Megatron ranks a model, a mini-batch and a machine allow; others are refused by name.

Imports no Megatron. That the data axis divides the mini-batch is checked before (config.py).
"""

from itertools import product

from astar_megatron.config import ParallelConfig
from conversion.families import Model
from conversion.tiles import MOST_RANKS, ParallelLayout

_AXES = ("tensor", "pipeline", "virtual", "context", "data", "expert")


class LayoutError(ValueError):
    """A layout that can't run; the message names the number that does not fit, and the largest part that does."""


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
    if not 1 <= size <= MOST_RANKS:  # else the search for one that fits would take hours
        raise LayoutError(f"parallel: {problem}")
    part = _largest_part(parallel, model, sequences=sequences, world_size=size)
    raise LayoutError(f"parallel: {problem}. Its largest part of up to {size} ranks that fits: {described(part)}")


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


def _largest_part(parallel: ParallelConfig, model: Model, *, sequences: int, world_size: int) -> ParallelConfig:
    """Return the layout with most ranks, up to `world_size`, that fits and whose axes divide those of `parallel`."""
    divisors = [[d for d in range(1, size + 1) if size % d == 0] for size in (getattr(parallel, a) for a in _AXES)]
    parts = [parallel.model_copy(update=dict(zip(_AXES, sizes, strict=True))) for sizes in product(*divisors)]
    fitting = [part for part in parts if part.world_size <= world_size and _problem(part, model, sequences) is None]
    return max(fitting, key=lambda part: part.world_size)  # there is one: a single rank fits every model


def described(parallel: ParallelConfig) -> str:
    """Return the axes that are longer than one, in words."""
    axes = [f"{axis}={getattr(parallel, axis)}" for axis in _AXES if getattr(parallel, axis) > 1]
    return " ".join(axes) or "one rank"
