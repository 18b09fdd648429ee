"""Which engine gets which requests, and when: queues that never run dry while there is work, and never hold all of it.

An engine decodes `max_num_seqs` sequences at once; twice as many are kept with it, so that it always has some waiting
when one ends, whoever is slow. What is not handed out yet may still go to any engine, so the tail is shared.
"""

from collections.abc import Iterable, Sequence
from itertools import groupby, islice

from astar_megatron.types import Prompt

type Item = tuple[Prompt, int, int]  # prompt, sample, seed


class Feed:
    """Hands out `work`, which is asked for more only when a queue runs low: it may be endless."""

    def __init__(self, work: Iterable[Item], num_engines: int, max_num_seqs: int) -> None:
        self._items = iter(enumerate(work))
        self._queue, self._refill = 2 * max_num_seqs, max(1, max_num_seqs // 4)
        self._load = [0] * num_engines  # requests that an engine has not answered
        self._waiting: dict[int, Item] = {}

    def due(self) -> list[tuple[int, list[tuple[int, Item]]]]:
        """Return (engine, requests) to hand out now, each request with its index in `work`."""
        found: list[tuple[int, list[tuple[int, Item]]]] = []
        while min(self._load) <= self._queue - self._refill:
            fresh = list(islice(self._items, sum(max(0, self._queue - count) for count in self._load)))
            if not fresh:
                break
            self._waiting.update(fresh)
            shares = _shares(fresh, self._load)
            self._load = [count + len(share) for count, share in zip(self._load, shares, strict=True)]
            found += [(engine, share) for engine, share in enumerate(shares) if share]
        return found

    def answered(self, engine: int, index: int) -> Item:
        """Hear that `engine` answered request `index`, and return it."""
        self._load[engine] -= 1
        return self._waiting.pop(index)


def _shares(items: Sequence[tuple[int, Item]], load: Sequence[int]) -> list[list[tuple[int, Item]]]:
    """Each engine's part of `items`: samples of a prompt that follow each other together, where the fewest wait.

    One engine computes the prefix that they have in common once.
    """
    shares: list[list[tuple[int, Item]]] = [[] for _ in load]
    for _, group in groupby(items, key=lambda item: item[1][0].uid):
        engine = min(range(len(load)), key=lambda i: load[i] + len(shares[i]))
        shares[engine] += group
    return shares
