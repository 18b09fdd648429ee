"""What the ranks of a policy have in common. Needs no Megatron: the driver makes it."""

from dataclasses import dataclass

from astar_megatron.config import OptimConfig, ParallelConfig
from astar_megatron.model.compute_type import ComputeType


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyOptions:
    """What every rank of a policy has in common.

    Master weights and gradients are float32 whatever `dtype` is. `reference` and `fp8` are the keys of
    config.ModelConfig; `optimizer_steps` are those of the whole run, which the learning rate follows. With `critic_lr`
    a critic learns beside the policy.
    """

    model_path: str
    dtype: ComputeType
    parallel: ParallelConfig
    optim: OptimConfig
    optimizer_steps: int
    seed: int
    reference: str = "resident"
    fp8: str | None = None
    critic_lr: float | None = None
