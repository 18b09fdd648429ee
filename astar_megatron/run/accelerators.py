"""What policy and engines take of the GPUs that they share by turns, and whether it fits.

An engine takes `rollout.gpu_memory_utilization` of each of its GPUs when it starts, for weights, cache and graphs, and
gives that back while the policy steps. A rank's allocator may then take what the processes' own contexts leave. Before
engines wake it gives back what `train.offload` names, and what it keeps must fit beside an engine. What a rank takes
about, with P its parameters (of the stage that has most), c bytes a number of the compute type, a micro-batch of T
tokens (over tensor * context; no more than the rank's part of a mini-batch), L layers of hidden size H, MLP width F (of
the experts a token goes to) and Q = (heads + key-value heads) * head_dim, which may be more than H:

    state       weights, gradients, optimiser, reference, critic: run/rank_state.py. No optimiser with optim.offload, no
                                     reference with model.reference=offload. While engines generate weights are kept,
                                     with `train.offload` too; the optimiser unless it is optimizer or all; gradients,
                                     reference and critic unless it is all
    activations T * L * c * (4 H + 2 Q + 3 F)  two norms' inputs and outputs; queries, keys, values and what attention
                                     gives; the MLP's two halves and their product; with parallel.recompute=full
                T * c * (L * H + 4 H + 2 Q + 3 F)  the layers' inputs, and one layer's
    FP8 copies  2 * P                with model.fp8, of products' weights, by rows and by columns; kept if it is none
    head        2 GiB                kernels' workspaces, a group of logits; kept if it is none, as activations are

Each of the k experts that a token goes to keeps its own copy of the token: (4 + k - 1) H in place of 4 H. Where queries
and keys have norms (Qwen3), these keep their inputs: 3 Q in place of 2 Q.

Of p stages each has L / p of the layers, of them stage s = 0, 1, ... keeps p - s micro-batches, the first T * L again.
With parallel.virtual = v > 1 a stage has v parts of L / (p * v) layers and keeps (v - 1) * p + 2 * (p - s - 1) + 1 of
their micro-batches, the first 1 + (p - 1) / (p * v) times T * L. Less where the mini-batch has fewer.

Qwen2.5-1.5B's shape, T = 16,384, took 60.4 GiB on one H200, where this says 62.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from astar_megatron.config import Offload, ParallelConfig, RunConfig
from astar_megatron.model.compute_type import NUMBER_BYTES, compute_type
from astar_megatron.run.rank_state import state_of_rank
from astar_megatron.run.resources import GIB, ResourceError, gib
from conversion.families import Model

CONTEXT_BYTES = 2 * GIB  # of both processes: the device's contexts, libraries' own allocations
HEAD_BYTES = 2 * GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class RankBytes:
    """What a rank takes, by the formula above; `critic` are its weights, what it learns with is with the policy's."""

    weights: int
    gradients: int
    optimizer: int
    reference: int
    critic: int
    activations: int
    fp8: int
    head: int

    @property
    def step(self) -> int:
        return self.activations + self.fp8 + self.head

    @property
    def most(self) -> int:
        """While it steps."""
        return self.weights + self.gradients + self.optimizer + self.reference + self.critic + self.step

    def kept(self, offload: Offload) -> int:
        """While engines generate."""
        given = {
            "none": 0,
            "cache": self.step,
            "optimizer": self.step + self.optimizer,
            "all": self.most - self.weights,
        }
        return self.most - given[offload]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """Bytes of a shared GPU: what there is, what an engine takes when it is awake, what a rank takes and keeps."""

    total: int
    engine: int
    policy: int  # that a rank may take while engines sleep
    policy_needs: int
    policy_keeps: int  # while they generate
    engine_needs: int  # at the least: its weights, and the cache of one longest sequence

    @property
    def policy_share(self) -> float:
        return self.policy / self.total

    def describe(self) -> str:
        """Return who gets what, in one line."""
        return (
            f"of a shared GPU's {gib(self.total)} the engine takes {gib(self.engine)} while it generates "
            f"(rollout.gpu_memory_utilization), and a policy rank keeps about {gib(self.policy_keeps)}; while it steps "
            f"it takes about {gib(self.policy_needs)} of at most {gib(self.policy)}"
        )


def shares_of(cfg: RunConfig, model: Model, gpu_bytes: int) -> Shares:
    """Return the shares of ranks and engines of GPUs that they share, the smallest of which has `gpu_bytes`. Pure.

    Raises ResourceError where a share is too small, naming the figures and what to change.
    """
    shares = _shares(cfg, model, gpu_bytes)
    if short := list(_shortages(shares, cfg)):
        raise ResourceError("; and ".join(short))
    return shares


def shortages(cfg: RunConfig, model: Model, gpu_bytes: int) -> list[str]:
    """Return in words each share of such GPUs that is too small; `shares_of` raises where there are any. Pure."""
    return list(_shortages(_shares(cfg, model, gpu_bytes), cfg))


def rank_bytes(cfg: RunConfig, model: Model, stage: int | None = None) -> RankBytes:
    """Return about how many bytes a rank of a pipeline stage takes; None: the most of each part that any stage has."""
    size, parallel = number_bytes(cfg), cfg.parallel
    stages = range(parallel.pipeline) if stage is None else (stage,)
    state = max((state_of_rank(cfg, model, size, stage) for stage in stages), key=lambda state: state.weights)
    return RankBytes(
        weights=state.weights,
        gradients=state.gradients,
        optimizer=0 if cfg.optim.offload else state.optimizer,
        reference=state.reference if cfg.model.reference == "resident" else 0,
        critic=state.critic,
        activations=activation_bytes(cfg, model, hidden=4, heads=2, width=3, stage=stage or 0),
        fp8=state.gradients // 2 if cfg.model.fp8 else 0,
        head=HEAD_BYTES,
    )


def micro_batch_tokens(cfg: RunConfig) -> int:
    """Return T: `train.micro_batch_tokens`, at least one longest sequence, at most a rank's part of a mini-batch."""
    return min(max(cfg.train.micro_batch_tokens, cfg.max_tokens), _mini_batch_tokens(cfg))


def activation_bytes(cfg: RunConfig, model: Model, *, hidden: int, heads: int, width: int, stage: int = 0) -> int:
    """Return the bytes of activations of a stage's rank; the first stage keeps most.

    Its layers keep `hidden` * H + `heads` * Q + `width` * F numbers a token.
    """
    parallel, dims, tokens = cfg.parallel, model.dims, micro_batch_tokens(cfg)
    layer = hidden * dims.hidden_size + width * dims.intermediate_size
    if dims.num_experts:
        chosen = dims.experts_per_token  # each with its copy of the input, for the gradient of its weights
        layer = (hidden + chosen - 1) * dims.hidden_size + width * chosen * dims.moe_intermediate_size
    heads += 1 if model.transformer_config()["qk_layernorm"] else 0
    layer += heads * (dims.num_heads + dims.num_kv_heads) * dims.head_dim
    under_way = min(_parts_kept(parallel, stage) * tokens, parallel.virtual * _mini_batch_tokens(cfg))
    is_made_again = parallel.recompute == "full"
    layers = dims.num_layers * (dims.hidden_size if is_made_again else layer)
    kept = under_way * layers // (parallel.pipeline * parallel.virtual)
    kept += tokens * layer if is_made_again else 0
    return number_bytes(cfg) * kept // (parallel.tensor * parallel.context)


def _parts_kept(parallel: ParallelConfig, stage: int) -> int:
    """Of how many micro-batches a stage keeps activations at once, of one of its `virtual` parts each; by Megatron."""
    after = parallel.pipeline - stage - 1
    return after + 1 if parallel.virtual == 1 else (parallel.virtual - 1) * parallel.pipeline + 2 * after + 1


def _mini_batch_tokens(cfg: RunConfig) -> int:
    """That a rank has of an optimiser step, at most; no micro-batch is of two steps."""
    return cfg.mini_batch_size // cfg.parallel.data * cfg.max_tokens


def worker_bytes(cfg: RunConfig, model: Model) -> int:
    """Return the bytes of weights of an engine's worker, padding included."""
    return number_bytes(cfg) * _worker_parameters(model, cfg.rollout.tensor)


@lru_cache(maxsize=256)
def _worker_parameters(model: Model, tensor: int) -> int:
    return sum(map(prod, model.vllm_shapes(tensor, 0).values()))


def token_bytes(cfg: RunConfig, model: Model) -> int:
    """Return the bytes of a token's keys and values in an engine's worker; beyond the heads there are, each has one."""
    heads = max(1, model.dims.num_kv_heads // cfg.rollout.tensor)
    return 2 * model.dims.num_layers * heads * model.dims.head_dim * number_bytes(cfg)


def engine_needs(cfg: RunConfig, model: Model) -> int:
    """Return the bytes without which no worker can start: weights, keys and values of one longest sequence."""
    return worker_bytes(cfg, model) + token_bytes(cfg, model) * cfg.max_tokens


def _shares(cfg: RunConfig, model: Model, gpu_bytes: int) -> Shares:
    rank = rank_bytes(cfg, model)
    return Shares(
        total=gpu_bytes,
        engine=int(gpu_bytes * cfg.rollout.gpu_memory_utilization),
        policy=gpu_bytes - CONTEXT_BYTES,
        policy_needs=rank.most,
        policy_keeps=rank.kept(cfg.train.offload),
        engine_needs=engine_needs(cfg, model),
    )


def _shortages(shares: Shares, cfg: RunConfig) -> Iterator[str]:
    if shares.engine_needs > shares.engine:
        yield (
            f"rollout.gpu_memory_utilization: {cfg.rollout.gpu_memory_utilization} of a shared GPU's "
            f"{gib(shares.total)} are {gib(shares.engine)}, but an engine needs more than "
            f"{gib(shares.engine_needs)} (weights, the cache of one sequence); raise it, or take a smaller model"
        )
    if shares.policy_needs > shares.policy:
        yield (
            f"memory of a shared GPU: a policy rank needs about {gib(shares.policy_needs)} to step, and may take "
            f"{gib(max(0, shares.policy))} of {gib(shares.total)} while engines sleep; lower train.micro_batch_tokens, "
            "set parallel.recompute=full, model.reference=offload or optim.offload=true, or take more GPUs"
        )
    if shares.engine + shares.policy_keeps > shares.policy:
        yield (
            f"memory of a shared GPU: a policy rank keeps about {gib(shares.policy_keeps)} while the engine, with "
            f"{gib(shares.engine)} (rollout.gpu_memory_utilization={cfg.rollout.gpu_memory_utilization}), generates, "
            f"and both may take {gib(max(0, shares.policy))} of {gib(shares.total)}; set train.offload=optimizer or "
            f"all (it is {cfg.train.offload}), or lower rollout.gpu_memory_utilization"
        )


def number_bytes(cfg: RunConfig) -> int:
    """Return c."""
    return NUMBER_BYTES[compute_type(cfg.model.dtype, num_gpus=1)[0]]
