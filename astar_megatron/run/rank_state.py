"""What the ranks of a policy hold from step to step, wherever it lies; for this machine's doctor and for a plan alike.

Of a rank with P parameters, padding of the vocabulary included, R replicas of them (of experts: R / expert) and c
bytes a number of the compute type (2 or 4):

    weights     c * P
    gradients   4 * P        fp32
    optimiser   8 * P / R    Adam's two moments, and with c = 2 master weights, 4 * P / R
    reference   c * P
    critic      c * P        a second model that learns, where there is one: gradients and optimiser count twice then

A head that is tied to the embedding is a second copy of it on the last of several stages. Left out: how buffers of
gradients and optimiser are aligned, 512 bytes a parameter at most, and the H numbers of a critic's head. Of an untied
model the critic's other head, which learns nothing, is counted as if it did.
"""

from dataclasses import astuple, dataclass
from functools import lru_cache
from math import prod

from astar_megatron.config import ParallelConfig, RunConfig
from astar_megatron.model.layouts import layout_of
from conversion.families import Model
from conversion.tiles import ParallelLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class RankState:
    """By the formula above; `critic` are its weights, what it learns with is with the policy's."""

    weights: int
    gradients: int
    optimizer: int
    reference: int
    critic: int

    @property
    def total(self) -> int:
        return sum(astuple(self))


def state_of_rank(cfg: RunConfig, model: Model, number_bytes: int, stage: int) -> RankState:
    """Return what each rank of a pipeline stage holds; `number_bytes` is c. Pure."""
    parallel = cfg.parallel
    dense, experts = _parameters(parallel, model, stage)
    parameters = dense + experts
    sharded = dense // parallel.replicas + experts * parallel.expert // parallel.replicas
    learners = 1 if cfg.critic_lr is None else 2
    return RankState(
        weights=number_bytes * parameters,
        gradients=learners * 4 * parameters,
        optimizer=learners * (12 if number_bytes == 2 else 8) * sharded,
        reference=number_bytes * parameters,
        critic=(learners - 1) * number_bytes * parameters,
    )


def state_of_all(cfg: RunConfig, model: Model, number_bytes: int) -> RankState:
    """Return what all ranks hold together. Pure."""
    stages = [astuple(state_of_rank(cfg, model, number_bytes, stage)) for stage in range(cfg.parallel.pipeline)]
    ranks = cfg.parallel.world_size // cfg.parallel.pipeline
    weights, gradients, optimizer, reference, critic = (ranks * sum(part) for part in zip(*stages, strict=True))
    return RankState(weights=weights, gradients=gradients, optimizer=optimizer, reference=reference, critic=critic)


def _parameters(parallel: ParallelConfig, model: Model, stage: int) -> tuple[int, int]:
    """Return the parameters of a rank of a stage, padding included: of experts last, and all others first."""
    first = stage * parallel.tensor * parallel.replicas  # a stage's ranks follow each other
    return _parameters_of(model, layout_of(parallel, fused_norms=False), first)


@lru_cache(maxsize=4096)  # whoever looks for a layout that fits asks for each many times
def _parameters_of(model: Model, layout: ParallelLayout, rank: int) -> tuple[int, int]:
    shapes = model.megatron_shapes(layout, rank)
    experts = sum(prod(shape) for name, shape in shapes.items() if ".experts." in name)
    return sum(map(prod, shapes.values())) - experts, experts
