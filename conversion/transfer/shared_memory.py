"""Carries a plan out through shared memory: one file per source rank, which all target ranks on the machine map.

A file holds a header and two slots of a bucket each. The sender packs bucket k into slot k % 2 while the receivers
copy bucket k - 1 out of the other one; it waits until all have taken bucket k - 2. The header's words, each on a cache
line of its own and written by one process only:

    fingerprint of the schedule | version | state | one word a receiver

The sender's state is serial << 32 | buckets packed; a receiver's is serial << 32 | buckets consumed; the serial counts
the sender's sends. GAVE_UP in their place tells the other side that nothing more will come. Waits are short sleeps,
and end with an error that names who is late: by a deadline since the last progress, or within a second where the other
process has ended, which its lock tells: the sender's on the file, a receiver's on its word.

Files and mappings live as long as their objects, because the first touch of a page costs several times a copy. Memory
beyond the tensors: two buckets a source rank, whoever and however many read them. A folder belongs to one run at a
time. Words are read and written whole by any process of one machine; the order of writes is that of x86-64, and on
others only as far as the interpreter's own locks keep it (not tested there).
"""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from conversion.plan import WeightPlan
from conversion.transfer import TransferError
from conversion.transfer.buckets import BUCKET_BYTES, part, schedule, wanted
from conversion.transfer.mapped_file import CREATOR, IN_THE_FILE, LINE_BYTES, MappedFile, Slots, create, finished
from conversion.transfer.pieces import placed, view

SHARED_MEMORY = Path("/dev/shm")
TIMEOUT_SECONDS = 120.0  # without any progress of the other side

_FINGERPRINT, _VERSION, _STATE, _FIRST_RECEIVER = 0, 1, 2, 3  # lines of the header
_GAVE_UP = -1
_CAME = 1  # a receiver's word before its first bucket: it has opened the file
_GONE_SECONDS = 10.0  # a receiver that is gone when a send begins may be about to be replaced
_GRACE_SECONDS = 1.0  # who only learns that the other side gave up speaks after it, so that the cause is heard first
_LONGEST_SLEEP_SECONDS = 2e-3


class SharedMemorySender:
    """The end at one source rank. Local to its process; holds the file and its mapping until `close`.

    `tensors` gives the local tensors by name, on whatever device; each send reads what they hold then. Every one of
    `num_engines` engines, whose workers are the plan's target ranks, must receive what is sent.
    """

    def __init__(
        self,
        plan: WeightPlan,
        rank: int,
        tensors: Mapping[str, Tensor],
        folder: str | Path,
        dtype: torch.dtype = torch.float32,
        *,
        bucket_bytes: int = BUCKET_BYTES,
        num_engines: int = 1,
        slots: Slots = IN_THE_FILE,
        timeout_seconds: float = TIMEOUT_SECONDS,
    ) -> None:
        self._rank, self._timeout = rank, timeout_seconds
        self._slots = slots
        self._schedule = schedule(plan, rank, dtype.itemsize, bucket_bytes)
        targets = _targets(plan, rank)
        self._receivers = [f"worker {t} of engine {e}" for e in range(num_engines) for t in targets]
        sources = [
            [(f.offset, view(tensors, part(f.piece, f.box))) for f in bucket] for bucket in self._schedule.buckets
        ]  # a plan for other tensors is refused before anything is written
        self._path = weight_file(folder, rank)
        size = _header_bytes(len(self._receivers)) + self._slots.num_bytes(self._schedule, len(self._receivers))
        self._file = MappedFile(create(self._path, size))
        memory = self._slots.create(self._file, self._schedule, len(self._receivers))
        self._copies = [
            [(source, placed(memory, slot + at, source, dtype)) for at, source in bucket]
            for slot, bucket in zip(self._schedule.slots(), sources, strict=True)
        ]
        self._serial, self._began = 0, 0.0
        self._file.write(_FINGERPRINT, self._schedule.fingerprint(str(dtype)))
        finished(self._path)

    def send(self, version: int = 0) -> None:
        """Packs bucket after bucket, cast to the wire's dtype; returns when the last is packed. TransferError."""
        if self._file.read(_STATE) == _GAVE_UP:
            raise TransferError(f"source rank {self._rank}: an earlier send failed; open a new sender")
        self._began = time.monotonic()
        try:
            self._wait_for(self._serial, len(self._copies))
            self._serial += 1
            self._file.write(_VERSION, version)
            self._file.write(_STATE, self._serial << 32)
            for number in range(len(self._copies)):
                self._wait_for(self._serial, number - self._schedule.num_slots + 1)
                self._pack(number)
                self._file.write(_STATE, self._serial << 32 | number + 1)
        except BaseException:
            self._file.write(_STATE, _GAVE_UP)
            raise

    @torch.no_grad()
    def _pack(self, number: int) -> None:
        for source, place in self._copies[number]:
            place.copy_(source)
        self._slots.settle()

    def _wait_for(self, serial: int, consumed: int) -> None:
        """Returns when every receiver has taken so many buckets of a send."""
        if serial == 0 or consumed <= 0:
            return
        goal = serial << 32 | consumed

        def states() -> list[int]:
            return [self._file.read(_FIRST_RECEIVER + i) for i in range(len(self._receivers))]

        def ready() -> bool:
            for name, state in zip(self._receivers, states(), strict=True):
                if state == _GAVE_UP:
                    time.sleep(_GRACE_SECONDS)
                    raise TransferError(f"{name} gave up while it took the weights of source rank {self._rank}")
            self._look_for_the_dead(serial, goal)
            return min(states()) >= goal

        def late() -> str:
            name, state = min(zip(self._receivers, states(), strict=True), key=lambda pair: pair[1])
            taken = state & 0xFFFFFFFF if state >> 32 == serial else 0
            return (
                f"{name} is late: it has taken {taken} of the {len(self._copies)} buckets of source rank {self._rank}, "
                f"and nothing new for {self._timeout:.0f} s; its process has ended, hangs, or was never told to receive"
            )

        _wait(ready, states, late, self._timeout)

    def _look_for_the_dead(self, serial: int, goal: int) -> None:
        """TransferError if a receiver that is waited for came once and has ended."""
        for line, name in enumerate(self._receivers, _FIRST_RECEIVER):
            state = self._file.read(line)
            if state in (0, _GAVE_UP) or state >= goal or self._file.is_held(line) is not False:
                continue
            in_the_middle = state >> 32 == serial
            late = time.monotonic() - self._began > min(_GONE_SECONDS, self._timeout / 2)
            if (in_the_middle or late) and self._file.read(line) == state:
                taken = state & 0xFFFFFFFF if in_the_middle else 0
                raise TransferError(
                    f"{name} has ended: its process is gone or closed its end after {taken} of the "
                    f"{len(self._copies)} buckets of source rank {self._rank}"
                )

    def close(self) -> None:
        """Removes the file; receivers keep their mapping until they close. Harmless if called twice."""
        if self._file.descriptor >= 0:
            self._path.unlink(missing_ok=True)
            self._copies = []
            self._file.close()


class SharedMemoryReceiver:
    """The end at one target rank of one engine. Opens the files at its first receive, or when it is told to `come`."""

    def __init__(
        self,
        plan: WeightPlan,
        rank: int,
        tensors: Mapping[str, Tensor],
        folder: str | Path,
        dtype: torch.dtype = torch.float32,
        *,
        bucket_bytes: int = BUCKET_BYTES,
        engine: int = 0,
        slots: Slots = IN_THE_FILE,
        timeout_seconds: float = TIMEOUT_SECONDS,
    ) -> None:
        self._timeout = timeout_seconds
        self._links = [
            _Link(plan, source, rank, engine, tensors, Path(folder), dtype, bucket_bytes, slots)
            for source in sorted({copy.source.rank for copy in plan.to_rank(rank)})
        ]

    def come(self) -> None:
        """Open the files that are there, so that senders see when this process ends, even before it has received."""
        for link in self._links:
            if link.is_there():
                link.open()

    def receive(self, version: int = 0) -> None:
        """Takes one send of every source rank into the tensors, cast to their dtype. TransferError."""
        try:
            for link in self._links:
                link.open()
            while waiting := [link for link in self._links if not link.done]:
                # Whoever has a bucket ready is served; a late source holds up only what it sends itself.
                _wait(
                    lambda waiting=waiting: sum(link.take(version) for link in waiting) > 0,
                    lambda waiting=waiting: [link.state() for link in waiting],
                    lambda waiting=waiting: waiting[0].late(self._timeout),
                    self._timeout,
                )
        except BaseException:
            for link in self._links:
                link.give_up()
            raise

    def close(self) -> None:
        """Lets go of the files and mappings."""
        for link in self._links:
            link.close()


class _Link:
    """One source rank, as one receiver sees it."""

    def __init__(
        self,
        plan: WeightPlan,
        source: int,
        rank: int,
        engine: int,
        tensors: Mapping[str, Tensor],
        folder: Path,
        dtype: torch.dtype,
        bucket_bytes: int,
        slots: Slots,
    ) -> None:
        self._source, self._path, self._dtype, self._slots = source, weight_file(folder, source), dtype, slots
        self._schedule = schedule(plan, source, dtype.itemsize, bucket_bytes)
        self._targets = {
            number: [(offset, view(tensors, piece)) for offset, piece in taken]
            for number, taken in wanted(plan, self._schedule, source, rank).items()
        }
        receivers = _targets(plan, source)
        self._line = _FIRST_RECEIVER + engine * len(receivers) + receivers.index(rank)
        self._file: MappedFile | None = None
        self._serial = self._last = self._num_taken = 0
        self.done = True

    def is_there(self) -> bool:
        """Whether the source has made its file, whole."""
        return self._path.exists()

    def open(self) -> None:
        """Maps the source's file, unless the one kept is still it, and gets ready for its next send."""
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            raise TransferError(f"{self._path} does not exist: source rank {self._source} has no open sender") from None
        file = MappedFile(descriptor)
        if self._file is not None and self._file.identity == file.identity:
            file.close()
            file = self._file
        else:
            self._check(file)
            self.close()
            self._file = file
            memory = self._slots.open(file, self._schedule, self._line - _FIRST_RECEIVER)
            slots = self._schedule.slots()
            self._copies = {
                k: [(t, placed(memory, slots[k] + at, t, self._dtype)) for at, t in taken]
                for k, taken in self._targets.items()
            }
            file.hold(self._line)
        had = file.read(self._line)
        if had == 0:
            file.write(self._line, _CAME)
        if had == _GAVE_UP:
            raise TransferError(f"{self._path}: this receiver gave up before; open a new sender, then a new receiver")
        self._last = had >> 32  # the send this receiver has had already
        self._serial, self.done = 0, False

    def _check(self, file: MappedFile) -> None:
        place = self._line - _FIRST_RECEIVER + 1
        smallest = _header_bytes(place) + self._slots.num_bytes(self._schedule, place)
        right = file.owner == os.geteuid() and file.num_bytes >= smallest
        if right and file.read(_FINGERPRINT) == self._schedule.fingerprint(str(self._dtype)):
            return
        size_and_owner = f"{file.num_bytes} bytes, owner {file.owner}"
        file.close()
        raise TransferError(
            f"{self._path} ({size_and_owner}) was not written for this plan, dtype and bucket size, for so many "
            f"engines ({smallest} bytes or more) or by this user ({os.geteuid()})"
        )

    def state(self) -> int:
        assert self._file is not None
        return self._file.read(_STATE)

    @torch.no_grad()
    def take(self, version: int) -> bool:
        """Takes the next bucket if it lies ready; True if it did."""
        assert self._file is not None
        state = self.state()
        if state == _GAVE_UP or (state >> 32 <= self._last and self._sender_ended_in(state)):
            time.sleep(_GRACE_SECONDS)
            raise TransferError(f"source rank {self._source} gave up, or its process has ended")
        serial, packed = state >> 32, state & 0xFFFFFFFF
        if serial <= self._last or self.done:
            return False
        if self._serial == 0:
            sent_version = self._file.read(_VERSION)
            if sent_version != version:
                raise TransferError(f"source rank {self._source} sends version {sent_version}, expected {version}")
            self._serial, self._num_taken = serial, 0
            self._skip()
            return True
        if serial != self._serial:
            raise TransferError(f"source rank {self._source} began its next send before this receiver had the last")
        if self._num_taken >= packed:
            if self._sender_ended_in(state):
                raise TransferError(f"source rank {self._source} ended after {packed} buckets; the tensors are mixed")
            return False
        for target, place in self._copies[self._num_taken]:
            target.copy_(place)
        self._slots.settle()
        self._num_taken += 1
        self._skip()
        return True

    def _sender_ended_in(self, state: int) -> bool:
        """True if the sender's process is gone and this was its last word, not one it has added to since."""
        assert self._file is not None
        return self._file.is_held(CREATOR) is False and self.state() == state

    def _skip(self) -> None:
        """Passes over buckets that hold nothing for this receiver, and tells the sender how far it is."""
        assert self._file is not None
        while self._num_taken < len(self._schedule.buckets) and self._num_taken not in self._copies:
            self._num_taken += 1
        self.done = self._num_taken == len(self._schedule.buckets)
        self._file.write(self._line, self._serial << 32 | self._num_taken)

    def late(self, seconds: float) -> str:
        sent = f"{self._num_taken} of its {len(self._schedule.buckets)} buckets" if self._serial else "nothing"
        return (
            f"source rank {self._source} is late: {sent} came, and nothing new for {seconds:.0f} s; it hangs, or was "
            "never told to send"
        )

    def give_up(self) -> None:
        if self._file is not None and not self.done:
            self._file.write(self._line, _GAVE_UP)

    def close(self) -> None:
        if self._file is not None:
            self._copies = {}
            self._file.close()
            self._file = None


def weight_file(folder: str | Path, rank: int) -> Path:
    """The file that source rank `rank` sends through."""
    return Path(folder) / f"weights-{rank:05d}.shm"


def _targets(plan: WeightPlan, source: int) -> list[int]:
    """The target ranks that want something of a source rank: its receivers, in each engine."""
    return sorted({copy.target.rank for copy in plan.from_rank(source)})


def _header_bytes(num_receivers: int) -> int:
    return (_FIRST_RECEIVER + num_receivers) * LINE_BYTES


def _wait(
    ready: Callable[[], bool], progress: Callable[[], object], late: Callable[[], str], timeout_seconds: float
) -> None:
    """Returns when `ready`; TransferError if nothing of what `progress` shows has changed for so long."""
    seen, pause = None, 2e-5
    deadline = time.monotonic() + timeout_seconds
    while not ready():
        now, last = time.monotonic(), seen
        if (seen := progress()) != last:
            deadline = now + timeout_seconds
        elif now > deadline:
            raise TransferError(late())
        time.sleep(pause)
        pause = min(1.5 * pause, _LONGEST_SLEEP_SECONDS)
