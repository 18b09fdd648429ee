"""The memory of a planned run, by process and part; pure arithmetic, for `astar plan`.

On GPUs, a process on each of its own or two by turns on one: what a policy rank takes is at the head of
run/accelerators.py, for each pipeline stage, and beside it

    buckets     2 * conversion.bucket_bytes         through which it sends its weights; at most their size
    reserve     RESERVE_SHARE of activations, head  blocks that the allocator keeps because no later tensor fits them;
                                                    given back where memory runs short, so nothing is refused for it
    context     1 GiB                               the device's context, libraries' own allocations

and an engine's worker takes `rollout.gpu_memory_utilization` of its GPU: its weights, WORK_BYTES, keys and values.

Without a GPU a process's resident memory is planned at its peak, in the first checkpoint: what run/accelerators.py says
with the activations of Megatron's local layers, which are not fused, and

    head        logits of 160 MiB at most, fp32 (model/head/chunked.py), and the gradient of its weights
    saving      SAVED_SHARE of a checkpoint's part
    process     Python, torch, Megatron or vLLM, Ray, as measured (run/resources.py)

Leaves out: libraries' workspaces of large models, what a user's reward takes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from astar_megatron.cluster.session import OBJECT_STORE_BYTES
from astar_megatron.config import RunConfig
from astar_megatron.model.compute_type import compute_type
from astar_megatron.model.gpus import Gpu
from astar_megatron.model.head import CPU_LOGITS_BYTES
from astar_megatron.run.accelerators import (
    CONTEXT_BYTES,
    RankBytes,
    activation_bytes,
    micro_batch_tokens,
    rank_bytes,
    token_bytes,
    worker_bytes,
)
from astar_megatron.run.resources import DRIVER_BYTES, ENGINE_BYTES, GIB, RANK_BYTES, checkpoint_bytes
from conversion.families import Model

# Of 32 GiB that came and went in a step 4.9 more stayed with the allocator: 67.3 in use on the card beside two contexts
# where tensors had 60.4 (Qwen2.5-1.5B, one H200).
RESERVE_SHARE = 0.15
WORK_BYTES = 2 * GIB  # of an engine: a prefill's activations, sampled logits, captured graphs; not measured
# Numbers that a local layer keeps a token, in units of H, Q and F (run/accelerators.py): two norms in fp32 (3 H each in
# bfloat16), inputs of the three products that have H; queries, keys, values and what attention gives, as they are and
# padded (4 Q); the MLP's two halves, silu and product.
LOCAL_HIDDEN, LOCAL_HEADS, LOCAL_WIDTH = 9, 4, 4
# Made between two steps, where malloc has the room of activations: 0.3 to 0.9 came on top in the runs of
# tests/plan_page.py. A disk so slow that the next step finds the copy there makes it 1.
SAVED_SHARE = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """What a process, or each of several alike, takes of a GPU, or of the host where there is none."""

    name: str
    count: int
    parts: Mapping[str, int]  # bytes, by name
    limit_bytes: int | None = None  # None: what fits is another's question

    @property
    def total_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def needs_bytes(self) -> int:
        """Without which it can't run."""
        return self.total_bytes - self.parts.get("reserve", 0)

    @property
    def fits(self) -> bool:
        return self.limit_bytes is None or self.needs_bytes <= self.limit_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """Keys and values of an engine's worker."""

    num_bytes: int
    token_bytes: int

    @property
    def num_tokens(self) -> int:
        return max(0, self.num_bytes // self.token_bytes)


def processes(cfg: RunConfig, model: Model, gpu: Gpu | None) -> list[Process]:
    """Return the run's processes, those alike once: ranks by stage, engines' workers, the driver where it counts.

    Without a GPU `model.dtype` is not auto: what that means is this machine's to say.
    """
    if gpu is None:
        return [_rank_on_cores(cfg, model), _engine_on_cores(cfg, model), _driver()]
    stages = [_rank(cfg, model, gpu, stage) for stage in range(cfg.parallel.pipeline)]
    workers = cfg.rollout.num_engines * cfg.rollout.tensor
    engine = Process(
        name="worker of an engine", count=workers, parts=_worker_parts(cfg, model, gpu), limit_bytes=_share(cfg, gpu)
    )
    return [*stages, engine]


def cache(cfg: RunConfig, model: Model, gpu: Gpu) -> Cache:
    """Return the room for keys and values of an engine's worker; none where the rest of it does not fit."""
    others = worker_bytes(cfg, model) + WORK_BYTES
    return Cache(num_bytes=max(0, _share(cfg, gpu) - others), token_bytes=token_bytes(cfg, model))


def _rank(cfg: RunConfig, model: Model, gpu: Gpu, stage: int) -> Process:
    rank = rank_bytes(cfg, model, stage)
    ranks = cfg.parallel.world_size // cfg.parallel.pipeline
    first = stage * ranks
    return Process(
        name=f"policy rank {first}" + (f" to {first + ranks - 1}" if ranks > 1 else ""),
        count=ranks,
        parts={
            **_parts(rank),
            "buckets": _buckets(cfg, rank),
            "reserve": int(RESERVE_SHARE * rank.step),
            "context": CONTEXT_BYTES // 2,
        },
        limit_bytes=gpu.memory_bytes,
    )


def _parts(rank: RankBytes) -> dict[str, int]:
    names = ("weights", "gradients", "optimizer", "reference", "critic", "activations", "fp8", "head")
    return {name: size for name in names if (size := getattr(rank, name))}


def _buckets(cfg: RunConfig, rank: RankBytes) -> int:
    return min(rank.weights, 2 * cfg.conversion.bucket_bytes)


def _share(cfg: RunConfig, gpu: Gpu) -> int:
    return int(gpu.memory_bytes * cfg.rollout.gpu_memory_utilization)


def _worker_parts(cfg: RunConfig, model: Model, gpu: Gpu) -> dict[str, int]:
    """The least an engine needs for keys and values is those of one longest sequence: less does not fit."""
    room = cache(cfg, model, gpu)
    return {
        "weights": worker_bytes(cfg, model),
        "work": WORK_BYTES,
        "keys and values": max(room.num_bytes, room.token_bytes * cfg.max_tokens),
    }


def _rank_on_cores(cfg: RunConfig, model: Model) -> Process:
    parallel, dims = cfg.parallel, model.dims
    vocabulary = dims.vocab_size // parallel.tensor
    logits = min(CPU_LOGITS_BYTES, 4 * micro_batch_tokens(cfg) * vocabulary)
    rank = replace(
        rank_bytes(cfg, model),
        activations=activation_bytes(cfg, model, hidden=LOCAL_HIDDEN, heads=LOCAL_HEADS, width=LOCAL_WIDTH),
        head=logits + 4 * vocabulary * dims.hidden_size,
    )
    dtype, _ = compute_type(cfg.model.dtype, num_gpus=0)
    saved = checkpoint_bytes(cfg, model.num_parameters(), dtype) // parallel.world_size
    own = {
        "buckets": _buckets(cfg, rank),
        "saving": int(SAVED_SHARE * saved),
        "process": RANK_BYTES,
    }
    return Process(name="policy rank", count=parallel.world_size, parts=_parts(rank) | own)


def _engine_on_cores(cfg: RunConfig, model: Model) -> Process:
    parts = {
        "weights": cfg.rollout.tensor * worker_bytes(cfg, model),
        "keys and values": cfg.rollout.kv_cache_gib * GIB,
        "process": ENGINE_BYTES,
    }
    return Process(name="engine", count=cfg.rollout.num_engines, parts=parts)


def _driver() -> Process:
    return Process(name="driver and Ray", count=1, parts={"process": DRIVER_BYTES, "object store": OBJECT_STORE_BYTES})
