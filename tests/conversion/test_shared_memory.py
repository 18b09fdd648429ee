"""The shared-memory transfer: privacy, lifetime, many readers, ends that die, and errors before anything is wrong."""

import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import at_once
from torch import Tensor
from transfer_process import BUCKET_BYTES, PLAN

from conversion.plan import WeightPlan, plan
from conversion.tiles import Tile
from conversion.transfer import TransferError
from conversion.transfer.buckets import Schedule
from conversion.transfer.mapped_file import MappedFile, Slots, create
from conversion.transfer.shared_memory import SharedMemoryReceiver, SharedMemorySender, weight_file
from conversion.verify import Holdings, Verifier, held_parts, sent_parts

TENSORS = {"a": torch.arange(12.0).view(3, 4)}
SMALL = plan([Tile(0, "a", "w", (0, 3), (0, 4))], [Tile(0, "b", "w", (0, 3), (0, 4), 1)])
HEADER_BYTES = 64 * 4


def target() -> dict[str, Tensor]:
    return {"b": torch.full((5, 4), -1.0)}


def large(seed: int = 0) -> dict[str, Tensor]:
    return {"a": torch.randn(64, 16, generator=torch.Generator().manual_seed(seed))}


type Opened = Callable[..., Any]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    """Return a function that opens an end of rank 0 in tmp_path; it is closed in the end."""
    with ExitStack() as ends:

        def end_of(kind: type, weights: WeightPlan, tensors: dict[str, Tensor], *more: Any, **options: Any) -> Any:
            return ends.enter_context(closing(kind(weights, 0, tensors, tmp_path, *more, **options)))

        yield end_of


@pytest.fixture
def small(opened: Opened) -> SharedMemorySender:
    return opened(SharedMemorySender, SMALL, TENSORS)


def both(
    opened: Opened, kind: type[SharedMemorySender], tensors: dict[str, Tensor], received: Tensor | None = None
) -> tuple[Any, Any]:
    """A sender of 16 buckets and its receiver, into zeros."""
    target = {"b": torch.zeros(64, 16) if received is None else received}
    options = {"bucket_bytes": BUCKET_BYTES, "timeout_seconds": 4}
    return opened(kind, PLAN, tensors, **options), opened(SharedMemoryReceiver, PLAN, target, **options)


def test_the_file_is_private_has_its_size_at_once_and_goes_away(small: SharedMemorySender, tmp_path: Path) -> None:
    status = weight_file(tmp_path, 0).stat()
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_size == HEADER_BYTES + 64
    small.close()
    small.close()
    assert not list(tmp_path.iterdir())


def test_each_send_carries_what_the_tensors_hold_then(opened: Opened) -> None:
    tensors, received = {"a": TENSORS["a"].clone().requires_grad_()}, target()
    sender, receiver = opened(SharedMemorySender, SMALL, tensors), opened(SharedMemoryReceiver, SMALL, received)
    for step in (0.0, 5.0):
        with torch.no_grad():
            tensors["a"] += step
        sender.send()
        receiver.receive()
        assert torch.equal(received["b"][1:4], tensors["a"].detach())
    assert (received["b"][[0, 4]] == -1).all()  # a region no tile covers is not touched


def test_the_files_stay_mapped_and_many_receivers_read_the_same_buckets(tmp_path: Path) -> None:
    """Two source ranks, three engines of two workers, more buckets than slots, three versions."""
    source = [Tile(r, "a", "w", (32 * r, 32 * r + 32), (0, 16)) for r in range(2)]
    halves = [Tile(r, "b", "w", (0, 64), (8 * r, 8 * r + 8)) for r in range(2)]
    weights, values = plan(source, halves), torch.zeros(64, 16)
    senders = [
        SharedMemorySender(weights, r, {"a": values[32 * r : 32 * r + 32]}, tmp_path, bucket_bytes=200, num_engines=3)
        for r in range(2)
    ]
    received = {(engine, r): torch.zeros(64, 8) for engine in range(3) for r in range(2)}
    receivers = [
        SharedMemoryReceiver(weights, r, {"b": tensor}, tmp_path, bucket_bytes=200, engine=engine)
        for (engine, r), tensor in received.items()
    ]
    inodes = None
    for version in (4, 5, 6):
        values.normal_()
        sends = [partial(sender.send, version) for sender in senders]
        at_once([*sends, *(partial(receiver.receive, version) for receiver in receivers)])
        for (_, r), tensor in received.items():
            assert torch.equal(tensor, values[:, 8 * r : 8 * r + 8])
        now = {weight_file(tmp_path, r).stat().st_ino for r in range(2)}
        assert inodes in (None, now)
        inodes = now
    for end in (*senders, *receivers):
        end.close()


def test_packing_overlaps_consuming(opened: Opened) -> None:
    """While the sender is slow with bucket k + 1 the receiver takes bucket k; it is never more than two behind."""

    class Slow(SharedMemorySender):
        taken: list[tuple[int, int]]

        def _pack(self, number: int) -> None:
            before = self._file.read(3) & 0xFFFFFFFF
            time.sleep(0.02)
            super()._pack(number)
            self.taken.append((number - before, number - (self._file.read(3) & 0xFFFFFFFF)))

    sender, receiver = both(opened, Slow, large())
    sender.taken = []
    at_once([sender.send, receiver.receive])
    assert len(sender.taken) == 16 and max(before for before, _ in sender.taken[1:]) == 1
    assert sum(after == 0 for _, after in sender.taken) > 8  # all before the one being packed are taken by then


def test_a_sender_that_is_not_there_or_does_not_send_is_named(opened: Opened) -> None:
    def receiver() -> SharedMemoryReceiver:
        return opened(SharedMemoryReceiver, SMALL, target(), timeout_seconds=0.3)

    with pytest.raises(TransferError, match="source rank 0 has no open sender"):
        receiver().receive()
    opened(SharedMemorySender, SMALL, TENSORS)
    with pytest.raises(TransferError, match="source rank 0 is late: nothing came"):
        receiver().receive()


def test_another_version_is_refused_at_both_ends(opened: Opened) -> None:
    sender, receiver = both(opened, SharedMemorySender, large())

    def refused(call: Callable[[int], None], version: int, message: str) -> None:
        with pytest.raises(TransferError, match=message):
            call(version)

    at_once(
        [
            lambda: refused(sender.send, 8, "worker 0 of engine 0 gave up"),
            lambda: refused(receiver.receive, 7, "sends version 8, expected 7"),
        ]
    )
    refused(sender.send, 9, "an earlier send failed")
    refused(receiver.receive, 9, "gave up before")


def test_a_receiver_whose_engine_is_not_among_the_senders_is_refused(opened: Opened, small: SharedMemorySender) -> None:
    with pytest.raises(TransferError, match="for so many engines"):
        opened(SharedMemoryReceiver, SMALL, target(), engine=1).receive()


def test_a_bucket_that_never_came_is_found_by_its_rows(opened: Opened) -> None:
    class Forgetful(SharedMemorySender):
        forgets: int | None = None

        def _pack(self, number: int) -> None:
            if number != self.forgets:
                super()._pack(number)

    tensors, received = large(), torch.zeros(64, 16)
    sender, receiver = both(opened, Forgetful, tensors, received)  # four rows a bucket
    sent = Holdings(sent_parts(PLAN, 0), tensors, torch.float32)
    arrived = Holdings(held_parts(PLAN, 0), {"b": received}, torch.float32)
    for forgets in (None, 9):
        sender.forgets = forgets
        tensors["a"].normal_()
        at_once([sender.send, receiver.receive])
        verifier = Verifier(PLAN)
        expected = verifier.manifest(0, {0: sent.digests()})
        assert verifier.first_mismatch(expected, 0, arrived.digests()) == (None if forgets is None else 0)
        wrong = [row for row, (a, b) in enumerate(zip(sent.rows(0), arrived.rows(0), strict=True)) if a != b]
        assert wrong == ([] if forgets is None else [36, 37, 38, 39])


def test_a_receiver_notices_a_restarted_sender(opened: Opened) -> None:
    received = target()
    receiver = opened(SharedMemoryReceiver, SMALL, received)
    for more in (0, 1):
        sender = opened(SharedMemorySender, SMALL, {"a": TENSORS["a"] + more})
        sender.send()
        receiver.receive()
        assert torch.equal(received["b"][1:4], TENSORS["a"] + more)
        sender.close()


def test_a_receiver_that_has_come_and_ended_before_it_received_is_named_long_before_the_deadline(
    opened: Opened,
) -> None:
    receiver = opened(SharedMemoryReceiver, PLAN, {"b": torch.zeros(64, 16)}, bucket_bytes=BUCKET_BYTES)
    receiver.come()  # there is no file yet
    sender, receiver = both(opened, SharedMemorySender, large())
    receiver.come()
    at_once([sender.send, receiver.receive])
    sender.close()
    sender, receiver = both(opened, SharedMemorySender, large())
    receiver.come()
    receiver.close()
    with pytest.raises(TransferError, match=r"worker 0 of engine 0 has ended: .* after 0 of the 16 buckets"):
        sender.send()


def test_a_receiver_that_ended_between_two_sends_is_named_long_before_the_deadline(opened: Opened) -> None:
    sender, receiver = both(opened, SharedMemorySender, large())
    at_once([sender.send, receiver.receive])
    receiver.close()
    with pytest.raises(TransferError, match=r"worker 0 of engine 0 has ended: .* after 0 of the 16 buckets"):
        sender.send()


def test_a_new_receiver_waits_for_the_next_send(opened: Opened, small: SharedMemorySender) -> None:
    """What an earlier receiver in its place has had already is no longer whole in the slots."""
    small.send()
    opened(SharedMemoryReceiver, SMALL, target()).receive()
    with pytest.raises(TransferError, match="is late: nothing came"):
        opened(SharedMemoryReceiver, SMALL, target(), timeout_seconds=0.2).receive()


def test_another_dtype_or_plan_is_refused(opened: Opened) -> None:
    opened(SharedMemorySender, SMALL, {"a": torch.zeros(30, 40)})
    wide = plan([Tile(0, "a", "w", (0, 30), (0, 4))], [Tile(0, "b", "w", (0, 30), (0, 4))])
    tall = plan([Tile(0, "a", "w", (0, 3), (0, 4))], [Tile(0, "b", "w", (0, 3), (0, 4), 2)])
    opened(SharedMemoryReceiver, tall, {"b": torch.zeros(5, 4)})._links[0].open()  # the same bytes: accepted
    for receiver in (
        opened(SharedMemoryReceiver, wide, {"b": torch.zeros(30, 4)}),
        opened(SharedMemoryReceiver, SMALL, {"b": torch.zeros(5, 4)}, torch.bfloat16),
    ):
        with pytest.raises(TransferError, match="was not written for this plan, dtype and bucket size"):
            receiver.receive()


def test_another_bucket_size_is_refused(opened: Opened) -> None:
    opened(SharedMemorySender, PLAN, large(), bucket_bytes=BUCKET_BYTES)
    with pytest.raises(TransferError, match="was not written for this plan, dtype and bucket size"):
        opened(SharedMemoryReceiver, PLAN, {"b": torch.zeros(64, 16)}, bucket_bytes=2 * BUCKET_BYTES).receive()


def test_a_live_senders_file_is_not_taken_and_a_dead_ones_is(
    opened: Opened, small: SharedMemorySender, tmp_path: Path
) -> None:
    with pytest.raises(FileExistsError, match="in use by another sender"):
        opened(SharedMemorySender, SMALL, TENSORS)
    small.close()
    weight_file(tmp_path, 0).write_bytes(b"left by a killed run")
    with pytest.raises(TransferError, match="20 bytes"):
        opened(SharedMemoryReceiver, SMALL, target()).receive()
    opened(SharedMemorySender, SMALL, TENSORS)


def test_of_senders_that_come_at_once_one_gets_the_name(tmp_path: Path) -> None:
    """With a barrier they look for the file of a dead one, and make theirs, within the same moment."""
    barrier, num_senders = threading.Barrier(4), 4

    def comes(_: int) -> int | None:
        barrier.wait()
        try:
            descriptor = create(weight_file(tmp_path, 0), 64)
        except FileExistsError:
            return None
        return descriptor

    with ThreadPoolExecutor(num_senders) as threads:
        for _ in range(200):
            (descriptor,) = filter(None, threads.map(comes, range(num_senders)))
            os.close(descriptor)


class Halfway(Slots):
    """Slots at whose making, when the file is reserved and not whole, something else happens."""

    def __init__(self, meanwhile: Callable[[], object]) -> None:
        self._meanwhile = meanwhile

    def create(self, file: MappedFile, order: Schedule, num_receivers: int) -> Tensor:
        self._meanwhile()
        return super().create(file, order, num_receivers)


def test_a_receiver_that_comes_while_the_file_is_made_does_not_see_it_yet(opened: Opened, tmp_path: Path) -> None:
    receiver, seen = opened(SharedMemoryReceiver, SMALL, target()), []

    def comes() -> None:
        receiver.come()
        seen.append([path.name for path in tmp_path.iterdir()])
        with pytest.raises(FileExistsError, match="in use by another sender"):
            SharedMemorySender(SMALL, 0, TENSORS, tmp_path)

    sender = opened(SharedMemorySender, SMALL, TENSORS, slots=Halfway(comes))
    assert len(seen[0]) == 1 and seen[0] != [weight_file(tmp_path, 0).name]
    receiver.come()
    sender.send()
    receiver.receive()
    assert [path.name for path in tmp_path.iterdir()] == [weight_file(tmp_path, 0).name]


def test_a_link_in_the_place_of_the_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"precious")
    weight_file(tmp_path, 0).symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic link"):
        SharedMemorySender(SMALL, 0, TENSORS, tmp_path)
    assert (tmp_path / "victim").read_bytes() == b"precious"


def test_too_little_room_is_said_in_bytes() -> None:
    room = os.statvfs("/dev/shm")
    rows = room.f_blocks * room.f_frsize // 4
    huge = plan([Tile(0, "a", "w", (0, rows), (0, 2))], [Tile(0, "b", "w", (0, rows), (0, 2))])
    folder = Path(f"/dev/shm/conversion-test-{os.getpid()}")
    folder.mkdir()
    tensors = {"a": torch.empty(1, 1).expand(rows, 2)}
    try:
        with pytest.raises(OSError, match=rf"{8 * rows + HEADER_BYTES} bytes wanted, \d+ free"):
            SharedMemorySender(huge, 0, tensors, folder, bucket_bytes=8 * rows)
        assert not list(folder.iterdir())
        SharedMemorySender(huge, 0, tensors, folder, bucket_bytes=1 << 26).close()  # buckets make room enough
    finally:
        folder.rmdir()


@pytest.mark.parametrize("shape", [(2, 4), (3, 3), (12,)])
def test_tensors_the_plan_does_not_fit_are_named(shape: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a on rank 0 has shape"):
        SharedMemorySender(SMALL, 0, {"a": torch.zeros(shape)}, tmp_path)
    with pytest.raises(ValueError, match="no tensor b"):
        SharedMemoryReceiver(SMALL, 0, {}, tmp_path)
    assert not list(tmp_path.iterdir())
