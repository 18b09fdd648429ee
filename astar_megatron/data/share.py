"""One job's share of what a V* table lacks: claimed bucket by bucket, so that several jobs fill one table at once.

A bucket is the prompts whose uids have the same checksum, the same for every job. A job takes the lease of a bucket,
reads what others have added, draws what is missing then, and gives the lease back when it is on disk.
"""

import zlib
from collections.abc import Iterator, Sequence

import numpy as np

from astar_megatron.data.leases import Leases
from astar_megatron.data.v_star import VStarTable
from astar_megatron.types import Prompt, Rollout

_BUCKETS = 4096
_ROWS_AT_ONCE = 256  # claimed together: one look at the lease folder and at the table's


class Share:
    """What of the samples below `wanted` ([P], of `prompts`) this job draws."""

    def __init__(self, table: VStarTable, prompts: Sequence[Prompt], wanted: np.ndarray, leases: Leases) -> None:
        self._table, self._leases = table, leases
        rows = table.lacking(prompts, wanted)
        self.lacking = int(rows.sum())
        self._buckets: dict[str, list[int]] = {}
        for i in np.flatnonzero(rows).tolist():
            self._buckets.setdefault(_bucket(prompts[i]), []).append(i)
        self._rows, self._prompts, self._wanted = rows, prompts, wanted
        self._left: dict[str, int] = {}  # rows of a bucket held that are not on disk

    def take(self) -> Iterator[tuple[Prompt, int]]:
        """Yield (prompt, sample), claimed as they are asked for; ends when the rest is on disk or others have it."""
        names = sorted(self._buckets)
        start = zlib.crc32(self._leases.owner.encode()) % (len(names) or 1)  # jobs begin at different places
        waiting: list[str] = []
        rows = 0
        for name in [*names[start:], *names[:start]]:
            waiting.append(name)
            rows += int(self._rows[self._buckets[name]].sum())
            if rows >= _ROWS_AT_ONCE:
                yield from self._claim(waiting)
                waiting, rows = [], 0
        yield from self._claim(waiting)

    def appended(self, rollouts: Sequence[Rollout]) -> None:
        """Hear what is on disk now; a bucket of which nothing else is to be drawn is given back."""
        done = []
        for rollout in rollouts:
            name = _bucket(rollout.prompt)
            self._left[name] -= 1
            if not self._left[name]:
                done.append(name)
        self._leases.release(done)

    def _claim(self, names: Sequence[str]) -> Iterator[tuple[Prompt, int]]:
        claimed = self._leases.claim(names)
        self._table.refresh()  # after the claim: what the last holder appended is there now
        for name in claimed:
            place = self._buckets[name]
            missing = self._table.missing([self._prompts[i] for i in place], self._wanted[place])
            self._left[name] = len(missing)
            if not missing:
                self._leases.release([name])
            yield from missing


def _bucket(prompt: Prompt) -> str:
    return f"{zlib.crc32(prompt.uid.encode()) % _BUCKETS:03x}"
