"""Where the two slots of a source rank lie: the buffers that its buckets take turns in."""

from torch import Tensor

from conversion.transfer.buckets import Schedule
from conversion.transfer.mapped_file import MappedFile


class Slots:
    """The slots are the end of the file; in a GPU's memory, with handles there instead, see cuda_ipc.DeviceSlots."""

    def num_bytes(self, order: Schedule, num_receivers: int) -> int:
        """What they need of the end of the file."""
        return order.num_slots * order.slot_bytes

    def create(self, file: MappedFile, order: Schedule, num_receivers: int) -> Tensor:
        """The slots as bytes, for the sender."""
        return file.bytes[file.num_bytes - self.num_bytes(order, num_receivers) :]

    def open(self, file: MappedFile, order: Schedule, receiver: int) -> Tensor:
        """The same slots, for a receiver."""
        return self.create(file, order, receiver + 1)

    def settle(self) -> None:
        """Returns when the copies into or out of a slot have been made; those of a host's memory are."""


IN_THE_FILE = Slots()
