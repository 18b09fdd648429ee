"""Which way weights go between given places, and why; and the ends of that way. The choice is made here only.

| where the tensors are | way |
| --- | --- |
| all on CPUs that see one /dev/shm | shared memory |
| all on CPUs, of several hosts | gloo |
| every policy rank on the GPU of each worker it sends to | CUDA IPC |
| on GPUs, each process on one of its own | NCCL |
| any mixture of these | through the hosts' memory: shared memory, or gloo between hosts |

On a CPU gloo runs the code of NCCL's way. CUDA IPC has run on one GPU, between one rank and one engine; NCCL has not
run yet, and a reason that names it says so.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conversion.plan import WeightPlan
from conversion.transfer.buckets import BUCKET_BYTES
from conversion.transfer.cuda_ipc import DeviceSlots, device_name
from conversion.transfer.mapped_file import IN_THE_FILE, Slots
from conversion.transfer.process_group import GroupReceiver, GroupSender, Way, World
from conversion.transfer.shared_memory import SHARED_MEMORY, TIMEOUT_SECONDS, SharedMemoryReceiver, SharedMemorySender

type Sender = SharedMemorySender | GroupSender
type Receiver = SharedMemoryReceiver | GroupReceiver

_UNTRIED = "this way has not been run on a GPU yet; each publish is verified all the same"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where an end's tensors are: `memory` names the /dev/shm that its process sees, `device` the GPU, "" on a CPU."""

    memory: str
    device: str = ""


@dataclass(frozen=True, kw_only=True)
class Route(World):
    """A way, and what its ends must know to find each other. Plain values: it crosses any RPC as a dictionary."""

    folder: str = ""  # of shared memory and CUDA IPC
    bucket_bytes: int = BUCKET_BYTES
    timeout_seconds: float = TIMEOUT_SECONDS

    def sender(self, plan: WeightPlan, rank: int, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Sender:
        """The end at source rank `rank`, which holds `tensors`; they travel as `dtype`."""
        if self.way in ("gloo", "nccl"):
            return GroupSender(plan, rank, tensors, self, dtype, **self._bounds)
        options: dict[str, Any] = self._bounds | {"slots": self._slots(tensors)}
        return SharedMemorySender(plan, rank, tensors, self.folder, dtype, num_engines=self.num_engines, **options)

    def receiver(
        self, plan: WeightPlan, rank: int, tensors: Mapping[str, Tensor], dtype: torch.dtype, engine: int = 0
    ) -> Receiver:
        """The end at target rank `rank` of an engine, which holds `tensors`."""
        if self.way in ("gloo", "nccl"):
            return GroupReceiver(plan, rank, tensors, self, dtype, engine=engine, **self._bounds)
        options: dict[str, Any] = self._bounds | {"slots": self._slots(tensors)}
        receiver = SharedMemoryReceiver(plan, rank, tensors, self.folder, dtype, engine=engine, **options)
        receiver.come()
        return receiver

    @property
    def _bounds(self) -> dict[str, Any]:
        return {"bucket_bytes": self.bucket_bytes, "timeout_seconds": self.timeout_seconds}

    def _slots(self, tensors: Mapping[str, Tensor]) -> Slots:
        if self.way == "shared memory":
            return IN_THE_FILE
        return DeviceSlots(next(iter(tensors.values())).device)


def here(device: torch.device) -> Place:
    """The place of tensors of this process on `device`."""
    boot = Path("/proc/sys/kernel/random/boot_id")  # containers of one machine may see different /dev/shm
    machine = boot.read_text(encoding="ascii").strip() if boot.is_file() else os.uname().nodename
    return Place(memory=f"{machine}/{SHARED_MEMORY.stat().st_dev}", device=device_name(device))


def choose(
    sources: Sequence[Place], engines: Sequence[Sequence[Place]], links: Collection[tuple[int, int]], memory: str
) -> tuple[Way, str]:
    """The way from source ranks to each engine's workers, with the reason in words.

    `links`: the (source rank, target rank) between which the plan has something to carry; `memory`: where the program
    that asks makes the folder of shared memory, as in its own `Place`.
    """
    workers = [place for engine in engines for place in engine]
    ends = [*sources, *workers]
    num_memories = len({end.memory for end in ends} | {memory})
    if not any(end.device for end in ends):
        if num_memories == 1:
            return "shared memory", "shared memory: policy and engines are on CPUs and see one /dev/shm"
        return "gloo", f"gloo: policy, engines and their driver are on CPUs and see {num_memories} different /dev/shm"
    if num_memories == 1 and all(
        sources[source].device and sources[source] == engine[target] for engine in engines for source, target in links
    ):
        return "cuda ipc", "CUDA IPC: each policy rank is on the GPU of the workers it sends to"
    if all(end.device for end in ends) and len({end.device for end in ends}) == len(ends):
        return "nccl", f"NCCL: each policy rank and each worker has a GPU of its own; {_UNTRIED}"
    reason = "through the host's memory, as some ends share a GPU and others do not, or have none"
    return ("shared memory", f"shared memory: {reason}") if num_memories == 1 else ("gloo", f"gloo: {reason}")
