"""Which layouts of Megatron ranks, and which lengths, a model and a mini-batch allow; others are refused by name.

Imports no Megatron. That the data axis divides the mini-batch is checked before (config.py).
"""

from collections.abc import Iterator
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


def check(parallel: ParallelConfig, model: Model, *, sequences: int) -> None:
    """Raise LayoutError unless `parallel` divides the model; `sequences` are those of an optimiser step."""
    if problem := _problem(parallel, model, sequences):
        if parallel.world_size > MOST_RANKS:  # the search for one that fits would take hours
            raise LayoutError(f"parallel: {problem}")
        part = next(parts(parallel, model, sequences=sequences))  # there is one: a single rank fits every model
        raise LayoutError(f"parallel: {problem}. Its largest part that fits: {part.describe()}")


def check_lengths(model: Model, path: str, *, max_tokens: int) -> None:
    """Raise ValueError where the model in `path` has fewer positions than prompt and response may take."""
    limit = model.gpt_options()["max_sequence_length"]
    if max_tokens > limit:
        raise ValueError(
            f"data.max_prompt_tokens + sampling.max_response_tokens: {max_tokens} exceeds the {limit} positions "
            f"of {path}; lower one of them"
        )


def parts(parallel: ParallelConfig, model: Model, *, sequences: int) -> Iterator[ParallelConfig]:
    """Yield the layouts that divide the model and whose axes divide those of `parallel`, most ranks first."""
    divisors = [[d for d in range(1, size + 1) if size % d == 0] for size in (getattr(parallel, a) for a in _AXES)]
    every = [parallel.model_copy(update=dict(zip(_AXES, sizes, strict=True))) for sizes in product(*divisors)]
    every.sort(key=lambda part: -part.world_size)
    return (part for part in every if _problem(part, model, sequences) is None)


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
