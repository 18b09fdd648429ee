"""Slots in a GPU's memory, for processes of one machine that use the same GPU: CUDA's inter-process handles.

Everything else is `shared_memory.py`: the words of the header still lie in the mapped file, and behind them a handle
for each receiver. A handle is numbers and bytes, written as JSON into a file that only this user can write; nothing is
unpickled. Each side waits for its own stream before it tells the other that a slot is full or empty, so no events have
to cross: a copy within a GPU is short beside the wait for a publish.

Each receiver has a handle of its own, because torch counts the receivers that let go of one.
"""

import json
from typing import Any

import torch
from torch import Tensor

from conversion.transfer import TransferError
from conversion.transfer.buckets import Schedule
from conversion.transfer.mapped_file import MappedFile, Slots

HANDLE_BYTES = 2048  # room for one handle; the rest of it is spaces
# The device, and what UntypedStorage._new_shared_cuda takes after its number: handle, bytes, offset, handle and offset
# of the counter, handle of the event, whether it waits for the event. Handles are bytes, in hexadecimal.
_TYPES = [str, str, int, int, str, int, str, bool]


class DeviceSlots(Slots):
    """Slots in the memory of `device`; `settle` waits for its current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def num_bytes(self, order: Schedule, num_receivers: int) -> int:
        """The handles' room in the file."""
        return num_receivers * HANDLE_BYTES

    def create(self, file: MappedFile, order: Schedule, num_receivers: int) -> Tensor:
        """Two buckets of device memory; their handles are written into the file, the first receiver's last."""
        memory = torch.empty(order.num_slots * order.slot_bytes, dtype=torch.uint8, device=self._device)
        for receiver in range(num_receivers):
            _, *shared = memory.untyped_storage()._share_cuda_()
            text = packed(device_name(self._device), shared)
            place = file.bytes[file.num_bytes - (receiver + 1) * HANDLE_BYTES :][:HANDLE_BYTES]
            place.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        return memory

    def open(self, file: MappedFile, order: Schedule, receiver: int) -> Tensor:
        """The same memory, seen from here. TransferError if it is another GPU's."""
        place = file.bytes[file.num_bytes - (receiver + 1) * HANDLE_BYTES :][:HANDLE_BYTES]
        name, shared = unpacked(bytes(place.tolist()))
        if name != (own := device_name(self._device)):
            raise TransferError(f"the slots lie on {name}, this receiver's tensors on {own}: CUDA IPC is for one GPU")
        torch.cuda.init()
        index = self._device.index if self._device.index is not None else torch.cuda.current_device()
        storage = torch.UntypedStorage._new_shared_cuda(index, *shared)
        empty = torch.empty(0, dtype=torch.uint8, device=storage.device)
        return empty.set_(storage, 0, (order.num_slots * order.slot_bytes,), (1,))

    def settle(self) -> None:
        torch.cuda.current_stream(self._device).synchronize()


def device_name(device: torch.device) -> str:
    """A GPU's name that is the same in all processes and no other GPU's: its UUID; "" where there is none."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else ""


def packed(device: str, shared: list[Any]) -> bytes:
    """A handle as it stands in the file."""
    text = json.dumps([device, *(value.hex() if isinstance(value, bytes) else value for value in shared)]).encode()
    if len(text) > HANDLE_BYTES:
        raise TransferError(f"a handle of CUDA IPC needs {len(text)} bytes, there is room for {HANDLE_BYTES}")
    return text.ljust(HANDLE_BYTES)


def unpacked(text: bytes) -> tuple[str, list[Any]]:
    """The device and the handle of `packed`. TransferError if it is none."""
    try:
        values = json.loads(text)
        if [type(value) for value in values] != _TYPES:
            raise TypeError(f"{values!r:.200}")
        return values[0], [bytes.fromhex(value) if isinstance(value, str) else value for value in values[1:]]
    except (ValueError, TypeError) as error:
        raise TransferError(f"no handle of CUDA IPC stands in the file: {error}") from None
