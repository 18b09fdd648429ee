"""The V* table: what the reference's own samples were rewarded with, kept on disk.

    <folder>/header.json       format version and contract
    <folder>/shard-*.parquet   rows; see shards.py
    <folder>/leases/           which job draws what; see leases.py

A row is one sample of one prompt: (uid, sample) -> reward, response tokens, seed, ... Shards only ever appear, whole.
The reward of a response that could not be scored is NaN, and counts as the lowest of its prompt's, at most 0: else a
reward that fails where it should be low would raise V*. A row of the same sample that has a reward takes its place.
V* itself is not stored: `estimate` computes it from the raw rewards for any beta1 (arXiv 2505.20686;
algorithm/value.py). A table is read by its small columns; the responses stay on disk. Up to 64 MiB are checked against
the shards' digests when opened; of a larger table only the pages that are read are checked.

Any number of jobs may append at once: nothing is lost. Of a sample that two of them drew one row counts, the one with
the smallest digest of (uid, sample, reward, tokens): the same in any order of reading, and no reward is favoured.

Legend: R rows, P prompts.
"""

import contextlib
import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa

from astar_megatron.data.contract import Contract
from astar_megatron.data.estimates import Estimates, counted, estimate
from astar_megatron.data.files import make_folder, storage_error
from astar_megatron.data.header import MissingTableError, check_header, make_header
from astar_megatron.data.shards import Response, TableError, read_responses, read_shard, shard_number, write_shard
from astar_megatron.types import Prompt, Rollout

# A row in memory, twenty bytes; `prompt` indexes the table's list of uids, `tokens` are of the response.
_ROW = np.dtype([("prompt", np.int32), ("sample", np.uint32), ("reward", np.float64), ("tokens", np.int32)])
_MERGE_ROWS = 1 << 16  # so many new rows, or a quarter of the old ones, are sorted in among the old


@dataclass(frozen=True, slots=True, kw_only=True)
class TableSummary:
    """What a table holds. The shares are of prompts; NaN where the table is empty."""

    prompts: int
    samples: int
    mean_reward: float
    all_wrong: float  # share of prompts without a reward of 1: a part of it is for the form
    all_right: float  # share of prompts whose rewards are all >= 1
    response_tokens: int  # tokens spent
    unscored: int  # samples that could not be scored

    def rows(self) -> list[tuple[str, str]]:
        """Return what there is to show, names and words."""
        each = f", {self.response_tokens / self.samples:.1f} each" if self.samples else ""
        rows = [
            ("prompts", f"{self.prompts}"),
            ("samples", f"{self.samples}"),
            ("mean reward", f"{self.mean_reward:.3f}"),
            ("all wrong / all right", f"{self.all_wrong:.1%} / {self.all_right:.1%} of the prompts"),
            ("response tokens", f"{self.response_tokens}{each}"),
        ]
        words = f"{self.unscored} samples, which count as the lowest of their prompt; `astar sweep` tries them again"
        return rows + ([("not scored", words)] if self.unscored else [])


class VStarTable:
    """The samples of one folder, made under one contract. Open it with `open` or `create_or_open`."""

    def __init__(self, folder: Path, contract: Contract | None, *, to_fill: bool) -> None:
        self.folder, self._contract, self._to_fill = folder, contract, to_fill
        self._uids: dict[str, int] = {}  # uid -> index, in order of appearance
        self._old = np.empty(0, _ROW)  # sorted by prompt, then sample, each once
        self._starts = np.zeros(1, np.int64)  # where in _old the rows of a prompt begin
        self._new: list[np.ndarray] = []  # of _ROW, in order of appearance
        self._shards: set[str] = set()  # names of those read or written
        self._damaged: set[str] = set()  # names of those of them that could not be read
        self._next_shard = 1

    @classmethod
    def create_or_open(cls, folder: str | Path, contract: Contract) -> Self:
        """Return the table at `folder` to fill it, made empty where there is none. A damaged shard is set aside.

        Raises StorageError and what `open` raises.
        """
        folder = Path(folder)
        make_folder(folder)
        if not (folder / "header.json").exists() and not any(folder.glob("shard-*")):
            make_header(folder, contract)
        return cls.open(folder, contract, to_fill=True)

    @classmethod
    def open(
        cls,
        folder: str | Path,
        contract: Contract | None,
        check_whole_bytes: int = 64 << 20,
        *,
        to_fill: bool = False,
    ) -> Self:
        """Return the table at `folder`. A damaged shard is named in a warning: its rows are missing again.

        Only `to_fill` it a damaged shard is renamed away, or anything else changed. `contract` None takes any table, to
        look at it. One of more than `check_whole_bytes` has only the pages checked that are read.
        Raises MissingTableError, ContractError (field by field), TableError (newer format, no header), StorageError.
        """
        folder = Path(folder)
        check_header(folder, contract)
        table = cls(folder, contract, to_fill=to_fill)
        names = table._listed()
        whole = _no_more_than(check_whole_bytes, folder, names)
        for name in names:
            table._read(name, whole)
        return table

    def refresh(self) -> None:
        """Read the shards that other jobs have added since."""
        for name in self._listed():
            if name not in self._shards:
                self._read(name, whole=True)

    def append(self, rollouts: Sequence[Rollout], text: bool = False) -> None:
        """Write scored rollouts as one shard, on disk on return. Of a (uid, sample) that comes twice one row counts.

        `text` keeps the responses' text beside their tokens. Costs the same whatever the table holds. Raises
        StorageError (nothing of the shard is left, earlier ones are untouched), TableError for a reward that is not
        finite, and ContractError where the folder has been deleted and made anew for another contract since the
        table was opened.
        """
        if rollouts:
            check_header(self.folder, self._contract)
            name, columns = write_shard(self.folder, self._next_shard, rollouts, text)
            self._add(name, columns)

    def lacking(self, prompts: Sequence[Prompt], num_samples: int | np.ndarray) -> np.ndarray:
        """Return [P] how many of the samples below `num_samples` (one for all, or [P]) each prompt lacks."""
        wanted = np.broadcast_to(np.asarray(num_samples), len(prompts))
        return wanted - self._have(self._index([prompt.uid for prompt in prompts]), wanted)

    def sample_counts(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """Return [P] how many samples of each prompt there are."""
        return self._have(self._index([prompt.uid for prompt in prompts]), np.full(len(prompts), 1 << 32))

    def missing(self, prompts: Sequence[Prompt], num_samples: int | np.ndarray) -> list[tuple[Prompt, int]]:
        """Return what a sweep still has to draw: (prompt, sample < `num_samples`), in order of `prompts`.

        `num_samples` is one for all, or [P]. For a few prompts it costs little, whatever the table holds.
        """
        wanted = np.broadcast_to(np.asarray(num_samples), len(prompts))
        if not len(prompts):
            return []
        if sum(map(len, self._new)) > max(_MERGE_ROWS, len(self._old) // 4):
            self._merge()
        index = self._index([prompt.uid for prompt in prompts])
        there = np.arange(wanted.max()) >= wanted[:, None]  # [P, samples]; those not wanted count as there
        place = np.full(len(self._uids) + 1, -1)  # by the index of a prompt: where it is in `prompts`
        place[index] = np.arange(len(prompts))
        place[-1] = -1  # of all that are nowhere in the table
        known = index[(index >= 0) & (index < len(self._starts) - 1)]
        parts = zip(self._starts[known], self._starts[known + 1], strict=True)
        old = np.concatenate([self._old[:0], *(self._old[begin:end] for begin, end in parts)])
        for rows in (old, *self._new):
            prompt, sample = place[rows["prompt"]], rows["sample"]
            inside = (prompt >= 0) & (sample < there.shape[1])
            there[prompt[inside], sample[inside]] = True
        return [(prompts[i], int(sample)) for i, sample in np.argwhere(~there)]

    def estimate(
        self,
        beta1: float,
        prompts: Sequence[Prompt] | None = None,
        num_samples: int | np.ndarray | None = None,
        *,
        level: float = 0.95,
    ) -> Estimates:
        """Return V* with its error and interval, of `prompts` (none: all in the table).

        Of each prompt the samples below `num_samples` count (one number for all, or [P]; none: all there are).
        `level` is of the interval.
        Raises MissingTableError where a prompt has none, or `lacking` says that it lacks some.
        """
        if num_samples is not None and np.any(np.asarray(num_samples) < 1):
            raise TableError(f"V* table: expected num_samples of at least 1, got {np.min(num_samples)}")
        rows, starts, counts = self._by_prompt()
        names = list(self._uids) if prompts is None else [prompt.uid for prompt in prompts]
        index = self._index(names)
        every = np.where(index >= 0, np.append(counts, 0)[index], 0)
        use = every if num_samples is None else np.broadcast_to(np.asarray(num_samples), len(names))
        have = every if num_samples is None else self._have(index, use)
        lacks = have < np.maximum(use, 1)
        if lacking := int(lacks.sum()):
            raise MissingTableError(
                f"V* table {self.folder}: {lacking} of {len(names)} prompts have less than "
                f"{max(1, int(use[lacks].min()))} samples; "
                "run `astar sweep` with this configuration: it draws what is missing"
            )
        return estimate(names, rows["reward"], rows["tokens"], starts[index], use, beta1, level=level)

    def lengths(self, prompts: Sequence[Prompt], num_samples: np.ndarray) -> list[list[int]]:
        """Return [P] the tokens of each response there is of the samples below `num_samples` [P]."""
        rows, starts, counts = self._by_prompt()
        lengths = []
        for index, most in zip(self._index([prompt.uid for prompt in prompts]), num_samples, strict=True):
            own = rows[starts[index] : starts[index] + counts[index]] if index >= 0 else rows[:0]
            lengths.append(own["tokens"][own["sample"] < most].tolist())
        return lengths

    def responses(self) -> Iterator[Response]:
        """Yield the response of every row there is, from the disk; what was drawn twice, twice."""
        for name in self._listed():
            if name not in self._damaged:
                yield from read_responses(self.folder / name)

    def unscored(self) -> set[tuple[str, int]]:
        """Return the (uid, sample) that could not be scored."""
        rows, _, _ = self._by_prompt()
        uids, unscored = list(self._uids), rows[np.isnan(rows["reward"])]
        return {(uids[row["prompt"]], int(row["sample"])) for row in unscored}

    def rewards(self) -> dict[str, list[float]]:
        """Return the rewards by uid, in order of their sample index."""
        rows, starts, counts = self._by_prompt()
        rewards = counted(rows["reward"], rows["prompt"], len(counts))
        return {
            uid: rewards[start : start + count].tolist()
            for uid, start, count in zip(self._uids, starts, counts, strict=True)
        }

    def summary(self) -> TableSummary:
        """Return counts and shares of the whole table."""
        rows, _, counts = self._by_prompt()
        num_prompts, reward = len(counts), counted(rows["reward"], rows["prompt"], len(counts))
        some_right = np.bincount(rows["prompt"][reward >= 1], minlength=num_prompts) > 0
        some_wrong = np.bincount(rows["prompt"][reward < 1], minlength=num_prompts) > 0
        return TableSummary(
            prompts=num_prompts,
            samples=len(rows),
            mean_reward=float(reward.mean()) if num_prompts else math.nan,
            all_wrong=float((~some_right).mean()) if num_prompts else math.nan,
            all_right=float((~some_wrong).mean()) if num_prompts else math.nan,
            response_tokens=int(rows["tokens"].sum(dtype=np.int64)),
            unscored=int(np.isnan(rows["reward"]).sum()),
        )

    def _have(self, index: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """[P] int64: how many of the samples below `wanted` [P] the prompts at `index` [P] have."""
        rows, _, _ = self._by_prompt()
        limit = np.zeros(len(self._uids), np.int64)
        limit[index[index >= 0]] = wanted[index >= 0]
        prompt = rows["prompt"]
        there = np.bincount(prompt[rows["sample"] < limit[prompt]], minlength=len(self._uids))
        return np.where(index >= 0, np.append(there, 0)[index], 0)

    def _index(self, uids: Sequence[str]) -> np.ndarray:
        """[P] int64: where each uid is in the table; -1: nowhere."""
        return np.array([self._uids.get(uid, -1) for uid in uids], dtype=np.int64)

    def _listed(self) -> list[str]:
        try:
            with os.scandir(self.folder) as entries:  # a Path an entry would take longer than the listing
                names = [entry.name for entry in entries]
        except OSError as error:
            raise storage_error(f"{self.folder}: can't list the V* table", error) from error
        return sorted(name for name in names if name.startswith("shard-") and name.endswith(".parquet"))

    def _read(self, name: str, whole: bool) -> None:
        self._seen(name)
        columns = read_shard(self.folder / name, whole, sets_aside=self._to_fill)
        if columns is None:
            self._damaged.add(name)
        else:
            self._add(name, columns)

    def _add(self, name: str, columns: pa.Table) -> None:
        self._seen(name)
        self._new.append(self._numbered(columns))

    def _seen(self, name: str) -> None:
        self._shards.add(name)
        self._next_shard = max(self._next_shard, shard_number(name) + 1)

    def _numbered(self, columns: pa.Table) -> np.ndarray:
        """The rows of a shard, [R] of _ROW."""
        uids = columns["uid"].unify_dictionaries().combine_chunks()
        uids = uids if isinstance(uids, pa.DictionaryArray) else uids.dictionary_encode()
        local = [self._uids.setdefault(uid, len(self._uids)) for uid in uids.dictionary.to_pylist()]
        rows = np.empty(len(columns), _ROW)
        rows["prompt"] = np.array(local, dtype=np.int32)[uids.indices.to_numpy()]
        for name, column in (("sample", "sample"), ("reward", "reward"), ("tokens", "response_tokens")):
            rows[name] = columns[column].to_numpy()
        return rows

    def _merge(self) -> None:
        """Sort the new rows in; of several of a (prompt, sample) with a reward that of the smallest digest stays."""
        if self._new:
            rows = np.concatenate([self._old, *self._new])
            self._old, self._new = np.empty(0, _ROW), []  # lets go of the parts, as large as they are together
            key = rows["prompt"].astype(np.int64) << 32 | rows["sample"]
            if not (key[1:] > key[:-1]).all():
                order = np.argsort(key, kind="stable")
                rows, key = rows[order], key[order]
                again = key[1:] == key[:-1]
                if again.any():
                    several = np.flatnonzero(np.append(False, again) | np.append(again, False))
                    digests = np.array(self._digests(rows[several]))
                    is_unscored = np.isnan(rows["reward"][several])
                    rows[several] = rows[several[np.lexsort((digests, is_unscored, key[several]))]]
                    rows = rows[np.append(True, ~again)]
            self._old = rows
            self._starts = np.append(0, np.cumsum(np.bincount(rows["prompt"], minlength=len(self._uids))))

    def _digests(self, rows: np.ndarray) -> list[bytes]:
        """[R], of what a row says, and nothing of when it came."""
        uids = list(self._uids)
        texts = (f"{uids[prompt]} {rest!r}" for prompt, *rest in rows.tolist())
        return [hashlib.blake2b(text.encode(), digest_size=8).hexdigest().encode() for text in texts]

    def _by_prompt(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All rows, and for each prompt [P] where its rows start and how many they are."""
        self._merge()
        return self._old, self._starts[:-1], np.diff(self._starts)


def _no_more_than(limit_bytes: int, folder: Path, names: Sequence[str]) -> bool:
    total = 0
    for name in names:
        with contextlib.suppress(FileNotFoundError):  # another job has just set it aside
            total += (folder / name).stat().st_size
        if total > limit_bytes:
            return False
    return True
