"""Device memory that a rank gives back while engines generate on the same GPU, and takes again before it trains.

Storages are emptied in place, not replaced: every view of them (main gradients, shards of the optimiser, parameters
of a bucket) is right again when they are filled. Megatron's own `offload_to_cpu` of an optimiser replaces tensors: its
float32 parameters, which are views of the model's, would be trained and never reach the model.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class Parking:
    """Empties storages on `device`, but none that lies under `kept`.

    `drop` forgets what was in them, `park` does not. Both return bytes, which the allocator has then.
    """

    def __init__(self, device: torch.device, kept: Iterable[Tensor]) -> None:
        self._device = device
        self._kept = {tensor.untyped_storage()._cdata for tensor in kept}
        self._storages: list[tuple[torch.UntypedStorage, int, Tensor | None]] = []  # size in bytes; content on the host
        self._pinned: dict[int, list[Tensor]] = {}  # by size, host memory for the next time: to pin takes long

    def park(self, tensors: Iterable[Tensor]) -> int:
        """Move what is under `tensors` to host memory."""
        return sum(self._empty(storage, keep=True) for storage in self._own(tensors))

    def drop(self, tensors: Iterable[Tensor]) -> int:
        """Forget what is under `tensors`; `restore` fills it with zeros."""
        return sum(self._empty(storage, keep=False) for storage in self._own(tensors))

    def restore(self) -> None:
        """Fill everything that was emptied."""
        for storage, size, host in self._storages:
            storage.resize_(size)
            content = torch.empty(0, dtype=torch.uint8, device=self._device).set_(storage)
            if host is None:
                content.zero_()
            else:
                content.copy_(host, non_blocking=True)
        if self._storages and self._device.type != "cpu":
            torch.accelerator.synchronize()  # the host's copies end here
            for _, size, host in self._storages:
                if host is not None:
                    self._pinned.setdefault(size, []).append(host)
        self._storages.clear()

    def _own(self, tensors: Iterable[Tensor]) -> list[torch.UntypedStorage]:
        storages = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if tensor.device.type != self._device.type or storage._cdata in self._kept or not storage.nbytes():
                continue
            if self._device.type != "cpu" or storage.resizable():  # on a CPU not what `numpy()` has looked at
                storages[storage._cdata] = storage
        return list(storages.values())

    def _empty(self, storage: torch.UntypedStorage, *, keep: bool) -> int:
        size, host = storage.nbytes(), None
        if keep:
            content = torch.empty(0, dtype=torch.uint8, device=self._device).set_(storage)
            host = self._host_memory(size).copy_(content)
        storage.resize_(0)
        self._storages.append((storage, size, host))
        return size

    def _host_memory(self, size: int) -> Tensor:
        if pinned := self._pinned.get(size):
            return pinned.pop()
        return torch.empty(size, dtype=torch.uint8, pin_memory=self._device.type != "cpu")


def optimizer_tensors(optimizer: Any) -> Iterable[Tensor]:
    """Yield what the optimisers of a rank hold: master weights, and the state of each but for its count of steps."""
    for inner in optimizer.chained_optimizers:
        adam = inner.optimizer
        if adam is None:  # a rank without parameters of this kind
            continue
        for group in adam.param_groups:
            for parameter in group["params"]:
                state = adam.state.get(parameter, {}).values()
                yield from (value for value in (parameter.data, *state) if isinstance(value, Tensor) and value.dim())


def forget_fp8_copies(modules: Iterable[torch.nn.Module]) -> None:
    """Drop the copies of weights in FP8 that Transformer Engine's layers keep from one micro-batch to the next.

    The first micro-batch of each step makes them again.
    """
    for module in modules:
        for layer in module.modules():
            getattr(layer, "_fp8_workspaces", {}).clear()


def gradient_buffers(modules: Iterable[Any]) -> Iterable[Tensor]:
    """Yield the buffers under the main gradients of Megatron's data-parallel modules."""
    for module in modules:
        for buffer in [*module.buffers, *module.expert_parallel_buffers]:
            yield buffer.grad_data
