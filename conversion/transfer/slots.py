"""Where the two slots of a source rank lie: the buffers that its buckets take turns in."""

from typing import Protocol

from torch import Tensor

from conversion.transfer.buckets import Schedule
from conversion.transfer.mapped_file import MappedFile


class Slots(Protocol):
    """Where the two slots of a source rank lie, and what must end before the other side may look at one."""

    def num_bytes(self, order: Schedule, num_receivers: int) -> int:
        """What they need of the end of the file."""
        ...

    def create(self, file: MappedFile, order: Schedule, num_receivers: int) -> Tensor:
        """The slots as bytes, for the sender."""
        ...

    def open(self, file: MappedFile, order: Schedule, receiver: int) -> Tensor:
        """The same slots, for a receiver."""
        ...

    def settle(self) -> None:
        """Returns when the copies into or out of a slot have been made."""
        ...


class FileSlots:
    """The slots are the end of the file."""

    def num_bytes(self, order: Schedule, num_receivers: int) -> int:
        """Both slots."""
        return order.num_slots * order.slot_bytes

    def create(self, file: MappedFile, order: Schedule, num_receivers: int) -> Tensor:
        """The bytes of the file, mapped."""
        return file.bytes[file.num_bytes - self.num_bytes(order, num_receivers) :]

    def open(self, file: MappedFile, order: Schedule, receiver: int) -> Tensor:
        """The same bytes."""
        return self.create(file, order, receiver + 1)

    def settle(self) -> None:
        """Nothing: a copy to or from a host's memory has been made when it returns."""


IN_THE_FILE = FileSlots()
