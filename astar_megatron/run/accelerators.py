"""What policy and engines take of the GPUs that they share, and whether it fits.

An engine takes `rollout.gpu_memory_utilization` of each of its GPUs when it starts, for weights, cache and graphs.
Ranks start when the engines are ready (vLLM measures what is free, and a process that takes or gives memory meanwhile
spoils the figure), and their allocator may take the rest, but for what the processes' own contexts need. What a rank
will take about, with P its parameters (those of the model over tensor * pipeline), R replicas, c bytes a number of the
compute type, a micro-batch of T tokens (over tensor * context), L layers of hidden size H and MLP width F (of the
experts a token goes to):

    weights     (c + 4) * P          and fp32 gradients
              + 8 * P / R            Adam's two moments, not with optim.offload
              + 4 * P / R if c = 2   fp32 master weights, not with optim.offload
              + c * P                the reference, not with model.reference=offload
    activations T * L * c * (7 H + 3 F)    inputs of norms, products and attention; with parallel.recompute=full
                T * c * (L * H + 7 H + 3 F)    the layers' inputs, and one layer's
    head        2 GiB                kernels' workspaces, a group of logits

Each stage of a pipeline keeps as many micro-batches as there are stages, of a part of the layers: T * L again.

Qwen2.5-1.5B's shape, T = 16,384, took 60.4 GiB on one H200, where this says 63.
"""

from dataclasses import dataclass

from astar_megatron.config import RunConfig
from astar_megatron.run.resources import GIB, ResourceError, gib
from conversion.families import Model

CONTEXT_BYTES = 2 * GIB  # of both processes: the device's contexts, libraries' own allocations
HEAD_BYTES = 2 * GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """Bytes of a shared GPU: what there is, what the engine takes, what the rank may take and about will."""

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
            f"of a shared GPU's {gib(self.total)} the engine takes {gib(self.engine)} "
            f"(rollout.gpu_memory_utilization), a policy rank at most {gib(self.policy)}, of which it needs about "
            f"{gib(self.policy_needs)}"
        )


def shares_of(cfg: RunConfig, model: Model, gpu_bytes: int) -> Shares:
    """Return the shares of ranks and engines of GPUs that they share, the smallest of which has `gpu_bytes`. Pure.

    Raises ResourceError where a share is too small, naming the figures and what to change.
    """
    engine = int(gpu_bytes * cfg.rollout.gpu_memory_utilization)
    shares = Shares(
        total=gpu_bytes,
        engine=engine,
        policy=gpu_bytes - engine - CONTEXT_BYTES,
        policy_needs=policy_needs(cfg, model),
        engine_needs=engine_needs(cfg, model),
    )
    _check(shares, cfg)
    return shares


def policy_needs(cfg: RunConfig, model: Model) -> int:
    """Return about how many bytes a rank takes, by the formula above."""
    size, dims, parallel = _number_bytes(cfg), model.dims, cfg.parallel
    parameters = model.num_parameters() // (parallel.tensor * parallel.pipeline)
    weights = (size + 4) * parameters
    if not cfg.optim.offload:
        weights += (12 if size == 2 else 8) * parameters // parallel.replicas
    if cfg.critic_lr is not None:  # a second model that learns, in the same way
        weights *= 2
    if cfg.model.reference == "resident":
        weights += size * parameters
    width = dims.moe_intermediate_size * dims.experts_per_token if dims.num_experts else dims.intermediate_size
    layer = 7 * dims.hidden_size + 3 * width  # numbers a token
    kept = dims.num_layers * layer
    if parallel.recompute == "full":
        kept = dims.num_layers * dims.hidden_size + layer
    tokens = max(cfg.train.micro_batch_tokens, cfg.max_tokens)
    return weights + tokens * size * kept // (parallel.tensor * parallel.context) + HEAD_BYTES


def engine_needs(cfg: RunConfig, model: Model) -> int:
    """Return the bytes without which no worker can start: weights, keys and values of one longest sequence."""
    size, dims = _number_bytes(cfg), model.dims
    cache = 2 * dims.num_layers * dims.num_kv_heads * dims.head_dim * cfg.max_tokens
    return size * (model.num_parameters() + cache) // cfg.rollout.tensor


def _check(shares: Shares, cfg: RunConfig) -> None:
    if shares.engine_needs > shares.engine:
        raise ResourceError(
            f"rollout.gpu_memory_utilization: {cfg.rollout.gpu_memory_utilization} of a shared GPU's "
            f"{gib(shares.total)} are {gib(shares.engine)}, but an engine needs more than "
            f"{gib(shares.engine_needs)} (weights, the cache of one sequence); raise it, or take a smaller model"
        )
    if shares.policy_needs > shares.policy:
        raise ResourceError(
            f"memory of a shared GPU: a policy rank needs about {gib(shares.policy_needs)}, and the engine leaves it "
            f"{gib(max(0, shares.policy))} of {gib(shares.total)} (rollout.gpu_memory_utilization="
            f"{cfg.rollout.gpu_memory_utilization}); lower that, train.micro_batch_tokens, set "
            "parallel.recompute=full, model.reference=offload or optim.offload=true, or take more GPUs"
        )


def _number_bytes(cfg: RunConfig) -> int:
    return 4 if cfg.model.dtype == "float32" else 2  # auto is bfloat16 on a GPU
