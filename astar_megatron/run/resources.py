"""What a run needs of this machine, what is free, and whether the one fits the other; before anything starts.

Memory of a run on a machine without accelerators, with P parameters, c bytes a number of the compute type (2 or 4), E
engines:

    policy     what all ranks hold: run/rank_state.py
    engines    E * (c * P + kv_cache_gib)
    saving     (c + 12) * P        a copy of what a checkpoint holds, while it is written
    shared     2 buckets a rank for the published weights, 2 for an export on its way to disk, at most c * P each,
               and 256 MiB for Ray's object store
    processes  the Python, torch, Megatron, vLLM and Ray of each process, as measured

It is the least a run needs: activations come on top. With accelerators policy and engines lie there, but for what keys
move here:

    optim.offload              the optimiser
    model.reference=offload    the reference
    train.offload              on shared GPUs, while engines generate: if it is optimizer, the optimiser; if all, this,
                               the reference and a critic's weights

Leaves out: the memory of accelerators and the time of a step, which are for `astar plan`.
"""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from astar_megatron.cluster import session
from astar_megatron.cluster.cgroups import group_folders, read_text
from astar_megatron.config import RunConfig
from astar_megatron.model.compute_type import NUMBER_BYTES, ComputeType, compute_type
from astar_megatron.run.local_accelerators import local_accelerators
from astar_megatron.run.rank_state import RankState, state_of_all
from conversion.families import Model
from conversion.transfer.buckets import BUCKET_BYTES

GIB = 1 << 30
RANK_BYTES = GIB * 3 // 4  # a Megatron process without its tensors
ENGINE_BYTES = 2 * GIB  # an engine's actor and its core without weights and cache
DRIVER_BYTES = GIB * 3 // 4  # the driver and Ray's own processes
# Of control groups of version 2 and 1: the files of limit and use, the field of what is only cached. Of version 1 a
# limit that is none is a number larger than any memory.
_GROUP_MEMORY = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.high", "memory.current", "inactive_file"),  # above which processes are slowed until they stand still
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


class ResourceError(ValueError):
    """This machine is too small for the run; the message names what is needed, what is free and what to change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a run can use, measured now."""

    memory_bytes: int
    shared_bytes: int  # free in /dev/shm
    num_accelerators: int
    accelerator_bytes: int = 0  # of the smallest


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """The least host memory of a run, by the formula above."""

    policy_bytes: int
    engines_bytes: int
    saving_bytes: int
    shared_bytes: int
    processes_bytes: int

    @property
    def memory_bytes(self) -> int:
        return self.policy_bytes + self.engines_bytes + self.saving_bytes + self.shared_bytes + self.processes_bytes


def needs(cfg: RunConfig, model: Model, machine: Machine) -> Needs:
    """Return what the run needs of the host. Pure."""
    accelerated = machine.num_accelerators > 0
    dtype, _ = compute_type(cfg.model.dtype, machine.num_accelerators)
    num_parameters, size = model.num_parameters(), NUMBER_BYTES[dtype]
    weights, ranks, engines = size * num_parameters, cfg.parallel.world_size, cfg.rollout.num_engines
    state = state_of_all(cfg, model, size)
    buckets = [min(weights, 2 * ranks * bucket) for bucket in (cfg.conversion.bucket_bytes, BUCKET_BYTES)]
    return Needs(
        policy_bytes=_moved_bytes(cfg, machine, state) if accelerated else state.total,
        engines_bytes=0 if accelerated else engines * (weights + cfg.rollout.kv_cache_gib * GIB),
        saving_bytes=checkpoint_bytes(cfg, num_parameters, dtype),
        shared_bytes=sum(buckets) + session.OBJECT_STORE_BYTES,
        processes_bytes=DRIVER_BYTES + ranks * RANK_BYTES + engines * ENGINE_BYTES,
    )


def _moved_bytes(cfg: RunConfig, machine: Machine, state: RankState) -> int:
    """What keys move from accelerators to the host."""
    processes = cfg.parallel.world_size + cfg.rollout.num_engines * cfg.rollout.tensor
    shared = cfg.cluster.share_gpus or (cfg.cluster.share_gpus is None and processes > machine.num_accelerators)
    offload = cfg.train.offload if shared else "none"
    moved = state.optimizer if cfg.optim.offload or offload in ("optimizer", "all") else 0
    moved += state.reference if cfg.model.reference == "offload" or offload == "all" else 0
    return moved + (state.critic if offload == "all" else 0)


def check_run(cfg: RunConfig, model: Model, machine: Machine | None = None) -> None:
    """Raise ResourceError or NoFolderError if this machine can't hold the run.

    A run that joins a Ray cluster (`cluster.address`) lies on other machines, which are not checked from here.
    """
    if cfg.cluster.address is not None:
        return
    session.folder_for_sessions()
    machine = machine or measure()
    need = needs(cfg, model, machine)
    if need.shared_bytes > machine.shared_bytes:
        raise ResourceError(
            f"/dev/shm: this run needs {gib(need.shared_bytes)} (weights on their way to the engines and to disk, "
            f"Ray's object store), {gib(machine.shared_bytes)} are free to write; remove old files there or "
            "enlarge it (mount -o remount,rw,size=..., or docker run --shm-size=...), or take a smaller model"
        )
    if need.memory_bytes > machine.memory_bytes:
        raise ResourceError(
            f"memory: this run needs at least {gib(need.memory_bytes)} (policy, optimiser and reference "
            f"{gib(need.policy_bytes)}, engines {gib(need.engines_bytes)}, a checkpoint that is written "
            f"{gib(need.saving_bytes)}, shared {gib(need.shared_bytes)}, "
            f"processes {gib(need.processes_bytes)}; activations come on top), {gib(machine.memory_bytes)} are "
            "available; close other programs, lower rollout.kv_cache_gib, rollout.num_engines or parallel.data, or "
            "take a smaller model"
        )


def check_disk(cfg: RunConfig, num_parameters: int, free: int | None = None) -> None:
    """Raise ResourceError if `free` bytes (none: measured) don't hold what training will write to `run_dir`.

    That is checkpoint.keep checkpoints, those that checkpoint.keep_every keeps, one on its way, and the export. What
    lies there already counts.
    """
    run_dir = Path(cfg.run_dir).absolute()
    num_gpus = 1 if cfg.cluster.address is not None else measure().num_accelerators  # of bfloat16 more is written
    dtype, _ = compute_type(cfg.model.dtype, num_gpus)
    checkpoint = checkpoint_bytes(cfg, num_parameters, dtype)
    count = cfg.checkpoint.keep + 1
    if cfg.checkpoint.keep_every is not None:
        count += cfg.train.num_steps // cfg.checkpoint.keep_every
    need = count * checkpoint + NUMBER_BYTES[dtype] * num_parameters
    if free is None:
        written = (path for name in ("checkpoints", "hf") for path in (run_dir / name).rglob("*"))
        there = next(folder for folder in (run_dir, *run_dir.parents) if folder.is_dir())
        free = free_bytes(there) + sum(path.stat().st_size for path in written if path.is_file())
    if need > free:
        raise ResourceError(
            f"run_dir={cfg.run_dir}: training will write {gib(need)} ({count} checkpoints of {gib(checkpoint)}, the "
            f"export), {gib(free)} are free; free some space, lower checkpoint.keep, raise checkpoint.keep_every, or "
            "choose a run_dir on a larger disk"
        )


def checkpoint_bytes(cfg: RunConfig, num_parameters: int, dtype: ComputeType) -> int:
    """Return the size of a checkpoint: weights, fp32 master weights (in float32 too) and Adam's two fp32 moments.

    Of a critic it holds as much again, of a reference that is a copy its weights.
    """
    weights = NUMBER_BYTES[dtype]
    parameter = (weights + 12) * (1 if cfg.critic_lr is None else 2)
    return (parameter + (weights if cfg.copies_reference else 0)) * num_parameters


def measure() -> Machine:
    """Return what this machine has free now."""
    return Machine(
        memory_bytes=available_memory_bytes(),
        shared_bytes=shared_memory_bytes(),
        num_accelerators=len(local_accelerators() or ()),
        accelerator_bytes=accelerator_bytes(),
    )


def available_memory_bytes(root: Path = Path("/")) -> int:
    """Return the memory that new processes can have: the system's, or less where control groups limit it."""
    available = int(_field(root / "proc/meminfo", "MemAvailable") or 0) * 1024
    for folder in group_folders("memory", root):
        for limit_file, used_file, cache_field in _GROUP_MEMORY:
            limit = read_text(folder / limit_file).strip()
            if not limit.isdigit():  # "max", or no such file: no limit
                continue
            used = int(read_text(folder / used_file) or 0)
            cache = int(_field(folder / "memory.stat", cache_field) or 0)  # given back when needed
            available = min(available, max(0, int(limit) - used + cache))
    return available


def shared_memory_bytes() -> int:
    """Return the bytes free in /dev/shm; 0 where it is not there, or can't be written."""
    return free_bytes(session.SHARED_MEMORY) if os.access(session.SHARED_MEMORY, os.W_OK) else 0


def accelerator_bytes() -> int:
    """Return the memory of the smallest accelerator that torch sees; 0 without any."""
    return min((accelerator.total_bytes for accelerator in local_accelerators() or ()), default=0)


def free_bytes(folder: Path) -> int:
    """Return the bytes free in `folder`; 0 where it does not exist."""
    return shutil.disk_usage(folder).free if folder.is_dir() else 0


def _field(path: Path, name: str) -> str | None:
    """Return what follows `name` in a file of the kernel's, such as `MemAvailable:  123 kB`; without its unit."""
    match = re.search(rf"^{name}\s*:?[ \t]*(.*?)(?: kB)?$", read_text(path), re.MULTILINE)
    return match[1] if match else None


def gib(num_bytes: int) -> str:
    """Return a size in GiB, with its unit."""
    return f"{num_bytes / GIB:.1f} GiB"
