"""The shared-memory transfer: privacy, lifetime, and errors before anything is silently wrong."""

import os
import stat
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conversion.plan import plan
from conversion.tiles import Tile
from conversion.transfer.shared_memory import SharedMemoryReceiver, SharedMemorySender, TransferError, weight_file

TENSORS = {"a": torch.arange(12.0).view(3, 4)}
PLAN = plan([Tile(0, "a", "w", (0, 3), (0, 4))], [Tile(0, "b", "w", (0, 3), (0, 4), 1)])


def target() -> dict[str, Tensor]:
    return {"b": torch.full((5, 4), -1.0)}


def test_the_file_is_private_has_its_size_at_once_and_goes_away(tmp_path: Path) -> None:
    sender = SharedMemorySender(PLAN, 0, TENSORS, tmp_path, torch.float32)
    status = weight_file(tmp_path, 0).stat()
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_size == 64 + sender.total_bytes == 64 + 64
    sender.close()
    sender.close()
    assert not list(tmp_path.iterdir())


def test_each_pack_carries_what_the_tensors_hold_then(tmp_path: Path) -> None:
    tensors, got = {"a": TENSORS["a"].clone().requires_grad_()}, target()
    sender = SharedMemorySender(PLAN, 0, tensors, tmp_path)
    receiver = SharedMemoryReceiver(PLAN, 0, got, tmp_path)
    for step in (0.0, 5.0):
        with torch.no_grad():
            tensors["a"] += step
        sender.pack()
        receiver.unpack()
        assert torch.equal(got["b"][1:4], tensors["a"].detach())
    assert (got["b"][[0, 4]] == -1).all()  # a region no tile covers is not touched
    receiver.close()
    sender.close()


def test_weights_that_were_never_fully_packed_are_refused(tmp_path: Path) -> None:
    receiver = SharedMemoryReceiver(PLAN, 0, target(), tmp_path)
    with pytest.raises(TransferError, match="no open sender"):
        receiver.unpack()
    sender = SharedMemorySender(PLAN, 0, TENSORS, tmp_path)
    with pytest.raises(TransferError, match="has not packed yet"):
        receiver.unpack()
    sender.pack()
    sender._header.fill_(-1)  # as a sender that dies within pack leaves it
    with pytest.raises(TransferError, match="died while it did"):
        receiver.unpack()
    sender.close()


def test_a_receiver_notices_a_restarted_sender(tmp_path: Path) -> None:
    got = target()
    receiver = SharedMemoryReceiver(PLAN, 0, got, tmp_path)
    first = SharedMemorySender(PLAN, 0, TENSORS, tmp_path)
    first.pack()
    receiver.unpack()
    first.close()
    second = SharedMemorySender(PLAN, 0, {"a": TENSORS["a"] + 1}, tmp_path)
    second.pack()
    receiver.unpack()
    assert torch.equal(got["b"][1:4], TENSORS["a"] + 1)
    second.close()


def test_another_dtype_or_plan_is_refused(tmp_path: Path) -> None:
    sender = SharedMemorySender(PLAN, 0, {"a": torch.zeros(30, 40)}, tmp_path)
    wide = plan([Tile(0, "a", "w", (0, 30), (0, 4))], [Tile(0, "b", "w", (0, 30), (0, 4))])
    with pytest.raises(TransferError, match="another plan, dtype or run"):
        SharedMemoryReceiver(wide, 0, {"b": torch.zeros(30, 4)}, tmp_path).unpack()
    sender.close()


def test_a_live_senders_file_is_not_taken_and_a_dead_ones_is(tmp_path: Path) -> None:
    sender = SharedMemorySender(PLAN, 0, TENSORS, tmp_path)
    with pytest.raises(FileExistsError, match="in use by another sender"):
        SharedMemorySender(PLAN, 0, TENSORS, tmp_path)
    sender.close()
    weight_file(tmp_path, 0).write_bytes(b"left by a killed run")
    SharedMemorySender(PLAN, 0, TENSORS, tmp_path).close()


def test_a_link_in_the_place_of_the_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"precious")
    weight_file(tmp_path, 0).symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic link"):
        SharedMemorySender(PLAN, 0, TENSORS, tmp_path)
    assert (tmp_path / "victim").read_bytes() == b"precious"


def test_too_little_room_is_said_in_bytes() -> None:
    room = os.statvfs("/dev/shm")
    rows = room.f_blocks * room.f_frsize // 4
    huge = plan([Tile(0, "a", "w", (0, rows), (0, 2))], [Tile(0, "b", "w", (0, rows), (0, 2))])
    folder = Path(f"/dev/shm/conversion-test-{os.getpid()}")
    folder.mkdir()
    try:
        with pytest.raises(OSError, match=rf"{8 * rows + 64} bytes wanted, \d+ free"):
            SharedMemorySender(huge, 0, {"a": torch.empty(1, 1).expand(rows, 2)}, folder)
        assert not list(folder.iterdir())
    finally:
        folder.rmdir()


@pytest.mark.parametrize("shape", [(2, 4), (3, 3), (12,)])
def test_tensors_the_plan_does_not_fit_are_named(shape: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a on rank 0 has shape"):
        SharedMemorySender(PLAN, 0, {"a": torch.zeros(shape)}, tmp_path)
    with pytest.raises(ValueError, match="no tensor b"):
        SharedMemoryReceiver(PLAN, 0, {}, tmp_path)
    assert not list(tmp_path.iterdir())
