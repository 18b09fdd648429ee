"""Which engine gets which requests, and when: queues that never run dry while there is work, and never hold all of it.

An engine decodes `max_num_seqs` sequences at once; twice as many are kept with it, so that it always has some waiting
when one ends, whoever is slow. What is not handed out yet may still go to any engine, so the tail is shared. What an
engine had when it ended is handed out again, before all else.
"""

import time
from collections import Counter, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from heapq import heapify, heapreplace
from itertools import groupby

from astar_megatron.types import Request

type Item = tuple[int, Request]  # the tag of a request, and the request


class Feed:
    """Hands out what is asked for, when an engine's queue runs low. `serving`: the engines that there are now."""

    def __init__(self, num_engines: int, max_num_seqs: int) -> None:
        self._queue, self._refill = 2 * max_num_seqs, max(1, max_num_seqs // 4)
        self._all = range(num_engines)
        self._load = [0] * num_engines  # requests that an engine has not answered
        self._waiting: deque[Item] = deque()
        self._handed_out: dict[int, Request] = {}
        self._ends: Counter[int] = Counter()  # by tag: how many engines have ended with it
        self._num_idle, self._noted_at = num_engines, time.perf_counter()
        self._idle_seconds = 0.0  # of all engines, until `_noted_at`
        self._busy_since: float | None = None  # when the first engine got a request; None: none has
        self._busy: list[tuple[float, float]] = []  # before that

    def ask(self, items: Iterable[Item]) -> None:
        self._waiting.extend(items)

    @property
    def num_waiting(self) -> int:
        """How many requests no engine has."""
        return len(self._waiting)

    def room(self) -> int:
        """Return how many requests beyond those that wait may be asked for now, for an engine to take them at once."""
        if self._has_enough(self._all):
            return 0
        return max(0, self._room(self._all) - len(self._waiting))

    def due(self, serving: Collection[int]) -> list[tuple[int, list[Item]]]:
        """Return (engine, requests) to hand out now."""
        due: list[tuple[int, list[Item]]] = []
        while self._waiting and not self._has_enough(serving):
            fresh = [self._waiting.popleft() for _ in range(min(self._room(serving), len(self._waiting)))]
            self._handed_out.update(fresh)
            shares = _shares(fresh, {engine: self._load[engine] for engine in serving})
            for engine, share in shares.items():
                self._change(engine, len(share))
            due += [(engine, share) for engine, share in shares.items() if share]
        return due

    def give_back(self, engine: int, tags: Iterable[int]) -> int:
        """Hear that `engine` ended and will not answer these; return how often the unluckiest of them met that."""
        items = [(tag, self._handed_out.pop(tag)) for tag in sorted(tags)]
        self._change(engine, -len(items))
        self._ends.update(tag for tag, _ in items)
        self._waiting.extendleft(reversed(items))
        return max((self._ends[tag] for tag, _ in items), default=0)

    def answered(self, engine: int, tag: int) -> Request:
        """Hear that `engine` answered a request, and return it."""
        self._change(engine, -1)
        self._ends.pop(tag, None)
        return self._handed_out.pop(tag)

    def take_idle_seconds(self) -> float:
        """Return how long an engine had no request since the last call, the mean over the engines."""
        self._note_idle()
        seconds, self._idle_seconds = self._idle_seconds / len(self._load), 0.0
        return seconds

    def take_busy(self) -> list[tuple[float, float]]:
        """Return from when to when any engine had a request since the last call, by time.perf_counter()."""
        busy, self._busy = self._busy, []
        if self._busy_since is not None:
            now = time.perf_counter()
            busy.append((self._busy_since, now))
            self._busy_since = now
        return busy

    def _change(self, engine: int, count: int) -> None:
        """Note that an engine has so many requests more."""
        was_idle = not self._load[engine]
        self._load[engine] += count
        if was_idle != (not self._load[engine]):
            self._note_idle()
            self._num_idle += -1 if was_idle else 1
            if self._busy_since is None:
                self._busy_since = self._noted_at
            elif self._num_idle == len(self._load):
                self._busy.append((self._busy_since, self._noted_at))
                self._busy_since = None

    def _note_idle(self) -> None:
        now = time.perf_counter()
        self._idle_seconds += self._num_idle * (now - self._noted_at)
        self._noted_at = now

    def _has_enough(self, serving: Collection[int]) -> bool:
        return min((self._load[engine] for engine in serving), default=self._queue) > self._queue - self._refill

    def _room(self, serving: Collection[int]) -> int:
        return sum(max(0, self._queue - self._load[engine]) for engine in serving)


def _shares(items: Sequence[Item], load: Mapping[int, int]) -> dict[int, list[Item]]:
    """Each engine's part of `items`: samples of a prompt that follow each other together, where the fewest wait.

    One engine computes the prefix that they have in common once.
    """
    shares: dict[int, list[Item]] = {engine: [] for engine in load}
    waiting = [
        (count, place, engine) for place, (engine, count) in enumerate(load.items())
    ]  # the first of equals first
    heapify(waiting)
    for _, group in groupby(items, key=lambda item: item[1].prompt.uid):
        count, place, engine = waiting[0]
        samples = list(group)
        shares[engine] += samples
        heapreplace(waiting, (count + len(samples), place, engine))
    return shares
