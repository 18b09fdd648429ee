"""Which engine gets which requests, and when: queues that never run dry while there is work, and never hold all of it.

An engine decodes `max_num_seqs` sequences at once; twice as many are kept with it, so that it always has some waiting
when one ends, whoever is slow. What is not handed out yet may still go to any engine, so the tail is shared.
"""

import time
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import groupby

from astar_megatron.types import Request

type Item = tuple[int, Request]  # the tag of a request, and the request


class Feed:
    """Hands out what is asked for, when an engine's queue runs low."""

    def __init__(self, num_engines: int, max_num_seqs: int) -> None:
        self._queue, self._refill = 2 * max_num_seqs, max(1, max_num_seqs // 4)
        self._load = [0] * num_engines  # requests that an engine has not answered
        self._waiting: deque[Item] = deque()
        self._handed_out: dict[int, Request] = {}
        self._idle_since: list[float | None] = [time.monotonic()] * num_engines  # None: it has requests
        self._idle_seconds = 0.0

    def ask(self, items: Iterable[Item]) -> None:
        self._waiting.extend(items)

    def room(self) -> int:
        """Return how many requests beyond those that wait may be asked for now, for an engine to take them at once."""
        if min(self._load) > self._queue - self._refill:
            return 0
        return max(0, self._room() - len(self._waiting))

    def due(self) -> list[tuple[int, list[Item]]]:
        """Return (engine, requests) to hand out now."""
        due: list[tuple[int, list[Item]]] = []
        while self._waiting and min(self._load) <= self._queue - self._refill:
            fresh = [self._waiting.popleft() for _ in range(min(self._room(), len(self._waiting)))]
            self._handed_out.update(fresh)
            shares = _shares(fresh, self._load)
            self._load = [count + len(share) for count, share in zip(self._load, shares, strict=True)]
            due += [(engine, share) for engine, share in enumerate(shares) if share]
        self._note_idle()
        return due

    def answered(self, engine: int, tag: int) -> Request:
        """Hear that `engine` answered a request, and return it."""
        self._load[engine] -= 1
        self._note_idle()
        return self._handed_out.pop(tag)

    def idle_seconds(self) -> float:
        """Return how long an engine had no request since the last call, the mean over the engines."""
        self._note_idle()
        seconds, self._idle_seconds = self._idle_seconds / len(self._load), 0.0
        return seconds

    def _note_idle(self) -> None:
        now = time.monotonic()
        self._idle_seconds += sum(now - since for since in self._idle_since if since is not None)
        self._idle_since = [None if count else now for count in self._load]

    def _room(self) -> int:
        return sum(max(0, self._queue - count) for count in self._load)


def _shares(items: Sequence[Item], load: Sequence[int]) -> list[list[Item]]:
    """Each engine's part of `items`: samples of a prompt that follow each other together, where the fewest wait.

    One engine computes the prefix that they have in common once.
    """
    shares: list[list[Item]] = [[] for _ in load]
    for _, group in groupby(items, key=lambda item: item[1].prompt.uid):
        engine = min(range(len(load)), key=lambda i: load[i] + len(shares[i]))
        shares[engine] += group
    return shares
