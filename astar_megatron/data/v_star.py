"""The V* table: what the reference's own samples were rewarded with, kept on disk.

    <folder>/header.json                             format version and contract
    <folder>/shard-000001-<16 hex of SHA-256>.parquet    rows; written once, never changed

A row is one sample of one prompt: (uid, sample) -> reward, response tokens, seed, ... Shards only ever appear, whole
(temporary file, fsync, rename), and their name carries the digest of their content. V* itself is not stored:
`estimate` computes it from the raw rewards for any beta1 (arXiv 2505.20686; algorithm/value.py).

A table is read by its small columns; the responses stay on disk. Up to 64 MiB of shards are checked against their
digest when opened; of a larger table, only the pages that are read are (each has a checksum of its own).
Leaves out: leases between jobs (two writers are safe, but may draw the same sample), standard errors, intervals.

Legend: R rows, P prompts.
"""

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from astar_megatron.algorithm.value import v_star
from astar_megatron.data.contract import Contract, ContractError
from astar_megatron.data.files import make_folder, storage_error, write_atomic
from astar_megatron.types import Prompt, Rollout

FORMAT = 1  # raise it when an older reader would misread a shard; a new column is no reason

_LOG = logging.getLogger(__name__)
_SCHEMA = pa.schema(
    [
        pa.field("uid", pa.string(), nullable=False),
        pa.field("sample", pa.uint32(), nullable=False),
        pa.field("reward", pa.float64(), nullable=False),
        pa.field("response", pa.list_(pa.int32()), nullable=False),
        pa.field("response_tokens", pa.int32(), nullable=False),
        pa.field("truncated", pa.bool_(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("logprob", pa.float64(), nullable=False),  # the engine's, summed over the response, nats
    ]
)
_COLUMNS = ["uid", "sample", "reward", "response_tokens"]  # what stays in memory


class TableError(ValueError):
    """A V* table that can't be used as asked."""


class MissingTableError(TableError, FileNotFoundError):
    """There is no V* table, or it lacks rows that are needed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableSummary:
    """What a table holds. The shares are of prompts; NaN where the table is empty."""

    prompts: int
    samples: int
    mean_reward: float
    all_wrong: float  # share of prompts whose rewards are all <= 0
    all_right: float  # share of prompts whose rewards are all >= 1
    response_tokens: int  # tokens spent


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """Columns of R rows; `prompt` indexes the table's list of uids."""

    prompt: np.ndarray  # [R] int32
    sample: np.ndarray  # [R] uint32
    reward: np.ndarray  # [R] float64
    tokens: np.ndarray  # [R] int32, of the response


class VStarTable:
    """The samples of one folder, made under one contract. Open it with `open` or `create_or_open`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._uids: dict[str, int] = {}  # uid -> index, in order of appearance
        self._parts: list[_Rows] = []  # in order of appearance; merged into one by _rows
        self._merged = False
        self._next_shard = 1

    @classmethod
    def create_or_open(cls, folder: str | Path, contract: Contract) -> Self:
        """Return the table at `folder`, made empty where there is none. Raises StorageError and what `open` raises."""
        folder = Path(folder)
        make_folder(folder)
        shards = any(folder.glob("shard-*"))
        if not (folder / "header.json").exists():
            if shards:
                raise TableError(f"{folder}: shards without header.json; restore it or choose another sweep.table")
            _write_header(folder, contract)
        try:
            return cls.open(folder, contract)
        except ContractError:
            if shards:
                raise
        _write_header(folder, contract)  # of a sweep that never drew: it binds nobody
        return cls.open(folder, contract)

    @classmethod
    def open(cls, folder: str | Path, contract: Contract, check_whole_bytes: int = 64 << 20) -> Self:
        """Return the table at `folder`. A damaged shard is set aside with a warning: its rows are missing again.

        A table of more than `check_whole_bytes` has only the pages checked that are read.
        Raises MissingTableError, ContractError (field by field), TableError (newer format), StorageError.
        """
        folder = Path(folder)
        _check_header(folder, contract)
        table = cls(folder)
        shards = sorted(folder.glob("shard-*.parquet"))
        whole = sum(path.stat().st_size for path in shards) <= check_whole_bytes
        for path in shards:
            if (columns := _read_shard(path, whole)) is not None:
                table._add(columns)
            table._next_shard = max(table._next_shard, _shard_number(path) + 1)
        return table

    def append(self, rollouts: Sequence[Rollout]) -> None:
        """Write scored rollouts as one shard, on disk on return. Of a (uid, sample) that comes twice the first counts.

        Raises StorageError (nothing of the shard is left, earlier ones are untouched) and TableError for a rollout
        without a finite reward.
        """
        if not rollouts:
            return
        for rollout in rollouts:
            if rollout.reward is None or not math.isfinite(rollout.reward):
                raise TableError(
                    f"V* table: the reward of sample {rollout.sample} of prompt {rollout.prompt.uid} is "
                    f"{rollout.reward}; score rollouts before they are appended"
                )
        columns = _columns(rollouts)
        sink = pa.BufferOutputStream()
        pq.write_table(columns, sink, compression="zstd", write_page_checksum=True)
        data = sink.getvalue().to_pybytes()
        name = f"shard-{self._next_shard:06d}-{hashlib.sha256(data).hexdigest()[:16]}.parquet"
        write_atomic(self.folder / name, data)
        self._next_shard += 1
        self._add(columns)

    def missing(self, prompts: Sequence[Prompt], num_samples: int) -> list[tuple[Prompt, int]]:
        """Return what a sweep still has to draw: (prompt, sample < `num_samples`), in order of `prompts`."""
        rows = self._rows()
        there = np.zeros((len(self._uids) + 1, num_samples), dtype=bool)  # the last: not in the table
        wanted = rows.sample < num_samples
        there[rows.prompt[wanted], rows.sample[wanted]] = True
        index = np.array([self._uids.get(prompt.uid, len(self._uids)) for prompt in prompts], dtype=np.int64)
        return [(prompts[i], int(sample)) for i, sample in np.argwhere(~there[index])] if len(index) else []

    def estimate(
        self, beta1: float, prompts: Sequence[Prompt] | None = None, num_samples: int | None = None
    ) -> dict[str, float]:
        """Return V* by uid, of `prompts` (none: all in the table), from the first `num_samples` samples (none: all).

        Raises MissingTableError where a prompt has none, or fewer than `num_samples`.
        """
        if num_samples is not None and num_samples < 1:
            raise TableError(f"V* table: expected num_samples of at least 1, got {num_samples}")
        rows, starts, counts = self._by_prompt()
        names = list(self._uids) if prompts is None else [prompt.uid for prompt in prompts]
        index = np.array([self._uids.get(uid, -1) for uid in names], dtype=np.int64)  # [P]
        have = np.where(index >= 0, np.append(counts, 0)[index], 0)
        if lacking := int((have < (num_samples or 1)).sum()):
            raise MissingTableError(
                f"V* table {self.folder}: {lacking} of {len(names)} prompts have less than {num_samples or 1} samples; "
                "run `astar sweep` with this configuration: it draws what is missing"
            )
        use = have if num_samples is None else np.full_like(have, num_samples)
        values = np.empty(len(names))
        for count in np.unique(use):  # prompts with equally many samples form one [P, N] array
            which = np.flatnonzero(use == count)
            rewards = rows.reward[starts[index[which], None] + np.arange(count)]
            values[which] = v_star(torch.from_numpy(rewards), beta1).numpy()
        return dict(zip(names, values.tolist(), strict=True))

    def rewards(self) -> dict[str, list[float]]:
        """Return the raw rewards by uid, in order of their sample index."""
        rows, starts, counts = self._by_prompt()
        return {
            uid: rows.reward[start : start + count].tolist()
            for uid, start, count in zip(self._uids, starts, counts, strict=True)
        }

    def summary(self) -> TableSummary:
        """Return counts and shares of the whole table."""
        rows, _, counts = self._by_prompt()
        num_prompts = len(counts)
        some_right = np.bincount(rows.prompt[rows.reward > 0], minlength=num_prompts) > 0
        some_wrong = np.bincount(rows.prompt[rows.reward < 1], minlength=num_prompts) > 0
        return TableSummary(
            prompts=num_prompts,
            samples=len(rows.reward),
            mean_reward=float(rows.reward.mean()) if num_prompts else math.nan,
            all_wrong=float((~some_right).mean()) if num_prompts else math.nan,
            all_right=float((~some_wrong).mean()) if num_prompts else math.nan,
            response_tokens=int(rows.tokens.sum(dtype=np.int64)),
        )

    def _add(self, columns: pa.Table) -> None:
        encoded = columns["uid"].combine_chunks().dictionary_encode()
        local = [self._uids.setdefault(uid, len(self._uids)) for uid in encoded.dictionary.to_pylist()]
        self._parts.append(
            _Rows(
                prompt=np.array(local, dtype=np.int32)[encoded.indices.to_numpy()],
                sample=columns["sample"].to_numpy(),
                reward=columns["reward"].to_numpy(),
                tokens=columns["response_tokens"].to_numpy(),
            )
        )
        self._merged = False

    def _rows(self) -> _Rows:
        """All rows, sorted by prompt, then sample; of several rows of one (prompt, sample) the first that came."""
        if not self._merged:
            parts = self._parts
            prompt = np.concatenate([np.empty(0, np.int32), *(part.prompt for part in parts)])
            sample = np.concatenate([np.empty(0, np.uint32), *(part.sample for part in parts)])
            reward = np.concatenate([np.empty(0, np.float64), *(part.reward for part in parts)])
            tokens = np.concatenate([np.empty(0, np.int32), *(part.tokens for part in parts)])
            key = prompt.astype(np.int64) << 32 | sample.astype(np.int64)
            _, first = np.unique(key, return_index=True)  # sorted keys; the index of the first of equal ones
            rows = _Rows(prompt=prompt[first], sample=sample[first], reward=reward[first], tokens=tokens[first])
            self._parts, self._merged = [rows], True
        return self._parts[0]

    def _by_prompt(self) -> tuple[_Rows, np.ndarray, np.ndarray]:
        """All rows, and for each prompt [P] where its rows start and how many they are."""
        rows = self._rows()
        counts = np.bincount(rows.prompt, minlength=len(self._uids))
        return rows, np.cumsum(counts) - counts, counts


def _write_header(folder: Path, contract: Contract) -> None:
    header = {"format": FORMAT, "contract": contract.fields(), "contract_digest": contract.digest()}
    write_atomic(folder / "header.json", json.dumps(header, indent=1).encode())


def _check_header(folder: Path, contract: Contract) -> None:
    path = folder / "header.json"
    try:
        header = json.loads(path.read_bytes())
        version, stored = int(header["format"]), dict(header["contract"])
    except FileNotFoundError:
        raise MissingTableError(
            f"{folder}: no V* table here; run `astar sweep` with this configuration first"
        ) from None
    except OSError as error:
        raise storage_error(f"{path}: can't read the V* table's header", error) from error
    except (ValueError, KeyError, TypeError) as error:
        raise TableError(
            f"{path}: not the header of a V* table ({error}); restore it or choose another sweep.table"
        ) from error
    if version > FORMAT:
        raise TableError(
            f"{folder}: the V* table has format {version}, this astar_megatron reads up to {FORMAT}; "
            "use the version that wrote it or a later one"
        )
    if lines := contract.difference(stored, names=("this run", "the table")):
        raise ContractError(
            f"{folder}: the V* table was made under another contract, its rewards do not fit this run:\n  "
            + "\n  ".join(lines)
            + "\nset these as the table has them, or choose another sweep.table and run `astar sweep`"
        )


def _columns(rollouts: Sequence[Rollout]) -> pa.Table:
    try:
        return pa.table(
            {
                "uid": [rollout.prompt.uid for rollout in rollouts],
                "sample": [rollout.sample for rollout in rollouts],
                "reward": [rollout.reward for rollout in rollouts],
                "response": [rollout.token_ids for rollout in rollouts],
                "response_tokens": [len(rollout.token_ids) for rollout in rollouts],
                "truncated": [rollout.truncated for rollout in rollouts],
                "seed": [rollout.seed for rollout in rollouts],
                "logprob": [rollout.logprob for rollout in rollouts],
            },
            schema=_SCHEMA,
        )
    except (pa.ArrowException, OverflowError) as error:
        raise TableError(
            f"V* table: {len(rollouts)} rollouts don't fit its columns ({error}); sample is uint32, tokens "
            "are int32, seed is int64, reward and logprob are numbers"
        ) from error


def _read_shard(path: Path, whole: bool) -> pa.Table | None:
    """The columns kept in memory; None for a damaged shard, which is renamed away. `whole` checks every byte first."""
    try:
        with path.open("rb") as file:
            if whole and not path.stem.endswith(hashlib.sha256(file.read()).hexdigest()[:16]):
                reason = "its content does not have the digest of its name"
            else:
                return pq.read_table(file, columns=_COLUMNS, page_checksum_verification=True)
    except (pa.ArrowException, pa.ArrowInvalid) as error:
        reason = str(error)
    except OSError as error:
        if error.errno is not None:  # the file system's own; pyarrow reports a bad checksum as an OSError without errno
            raise storage_error(f"{path}: can't read a shard of the V* table", error) from error
        reason = str(error)
    _LOG.warning("%s: damaged shard set aside, its rows are missing again (%s)", path, reason)
    try:
        path.rename(path.with_suffix(".damaged"))
    except OSError as error:
        _LOG.warning("%s: could not be renamed (%s); ignored", path, error)
    return None


def _shard_number(path: Path) -> int:
    digits = path.name.split("-")[1]
    return int(digits) if digits.isdecimal() else 0
