"""Who gets which accelerators: each rank and each worker of an engine one of its own, or two the only one together.

Where a machine has one, and the run is one rank and one engine of one worker in a Ray session of its own, they share
it. The engine takes `rollout.gpu_memory_utilization` of its memory when it starts, for weights, cache and graphs. The
rank starts when the engine is ready (vLLM measures what is free, and a process that takes or gives memory meanwhile
spoils the figure), and its allocator may take the rest, but for what the processes' own contexts need. What it will
take, with P parameters, c bytes a number of the compute type, a micro-batch of T tokens, L layers of hidden size H and
MLP width F (of the experts a token goes to):

    weights     (c + 4) * P          and fp32 gradients
              + 8 * P                Adam's two moments, not with optim.offload
              + 4 * P if c = 2       fp32 master weights, not with optim.offload
              + c * P                the reference, not with model.reference=offload
    activations T * L * c * (7 H + 3 F)    inputs of norms, products and attention; with parallel.recompute=full
                T * c * (L * H + 7 H + 3 F)    the layers' inputs, and one layer's
    head        2 GiB                kernels' workspaces, a group of logits

Qwen2.5-1.5B's shape, T = 16,384, took 60.4 GiB on one H200, where this says 63.
"""

from dataclasses import dataclass

from astar_megatron.config import RunConfig
from astar_megatron.run.resources import GIB, Machine, ResourceError, gib
from conversion.families import Model

CONTEXT_BYTES = 2 * GIB  # of both processes: the device's contexts, libraries' own allocations
HEAD_BYTES = 2 * GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """Bytes of the GPU's memory: what there is, what the engine takes, what the policy may take and about will."""

    total: int
    engine: int
    policy: int
    policy_needs: int
    engine_needs: int  # at the least: its weights, and the cache of one longest sequence

    @property
    def policy_share(self) -> float:
        return self.policy / self.total

    def describe(self) -> str:
        """Return who gets what, in one line."""
        return (
            f"policy and engine share the one GPU of {gib(self.total)}: the engine takes {gib(self.engine)} "
            f"(rollout.gpu_memory_utilization), the policy at most {gib(self.policy)}, of which it needs about "
            f"{gib(self.policy_needs)}"
        )


def free_accelerators(cfg: RunConfig, number: int) -> tuple[int, str]:
    """Return how many of `number` accelerators the engines leave to Megatron's ranks, and in words why. Pure."""
    if are_shared(cfg, number):
        return 1, "the rank and the engine share the only accelerator"
    engines = cfg.rollout.num_engines * cfg.rollout.tensor
    return (
        number - engines,
        f"of {number} accelerators the engines take {engines} (rollout.num_engines * rollout.tensor)",
    )


def are_shared(cfg: RunConfig, number: int) -> bool:
    """Say whether the run's one rank and one engine share the only one of `number` accelerators. Pure.

    Never in a cluster that was there before: nobody knows what else its accelerator has to hold.
    """
    alone = cfg.parallel.world_size == cfg.rollout.num_engines == cfg.rollout.tensor == 1
    return number == 1 and alone and cfg.cluster.address is None


def shares_of(cfg: RunConfig, model: Model, machine: Machine) -> Shares | None:
    """Return the shares of a run whose policy and engine have one GPU together; None where each has its own.

    Raises ResourceError where a share is too small, naming the figures and what to change. Pure.
    """
    if not are_shared(cfg, machine.num_accelerators):
        return None
    total = machine.accelerator_bytes
    engine = int(total * cfg.rollout.gpu_memory_utilization)
    shares = Shares(
        total=total,
        engine=engine,
        policy=total - engine - CONTEXT_BYTES,
        policy_needs=policy_needs(cfg, model),
        engine_needs=engine_needs(cfg, model),
    )
    _check(shares, cfg)
    return shares


def policy_needs(cfg: RunConfig, model: Model) -> int:
    """Return about how many bytes the only rank takes, by the formula above."""
    size, parameters, dims = _number_bytes(cfg), model.num_parameters(), model.dims
    weights = (size + 4) * parameters
    if not cfg.optim.offload:
        weights += (12 if size == 2 else 8) * parameters
    if cfg.critic_lr is not None:  # a second model that learns, in the same way
        weights *= 2
    if cfg.model.reference == "resident":
        weights += size * parameters
    width = dims.moe_intermediate_size * dims.experts_per_token if dims.num_experts else dims.intermediate_size
    layer = 7 * dims.hidden_size + 3 * width  # numbers a token
    kept = dims.num_layers * layer
    if cfg.parallel.recompute == "full":
        kept = dims.num_layers * dims.hidden_size + layer
    tokens = max(cfg.train.micro_batch_tokens, cfg.max_tokens)
    return weights + tokens * size * kept + HEAD_BYTES


def engine_needs(cfg: RunConfig, model: Model) -> int:
    """Return the bytes without which the engine can't start: weights, keys and values of one longest sequence."""
    size, dims = _number_bytes(cfg), model.dims
    cache = 2 * dims.num_layers * dims.num_kv_heads * dims.head_dim * cfg.max_tokens
    return size * (model.num_parameters() + cache)


def _check(shares: Shares, cfg: RunConfig) -> None:
    if shares.engine_needs > shares.engine:
        raise ResourceError(
            f"rollout.gpu_memory_utilization: {cfg.rollout.gpu_memory_utilization} of the one GPU's "
            f"{gib(shares.total)} are {gib(shares.engine)}, but the engine needs more than "
            f"{gib(shares.engine_needs)} (weights, the cache of one sequence); raise it, or take a smaller model"
        )
    if shares.policy_needs > shares.policy:
        raise ResourceError(
            f"memory of the one GPU: the policy needs about {gib(shares.policy_needs)}, and the engine leaves it "
            f"{gib(max(0, shares.policy))} of {gib(shares.total)} (rollout.gpu_memory_utilization="
            f"{cfg.rollout.gpu_memory_utilization}); lower that, train.micro_batch_tokens, set "
            "parallel.recompute=full, model.reference=offload or optim.offload=true, or take a second GPU"
        )


def _number_bytes(cfg: RunConfig) -> int:
    return 4 if cfg.model.dtype == "float32" else 2  # auto is bfloat16 on a GPU
