"""The files of a V* table: shards of rows, written once.

    shard-000001-<16 hex of SHA-256>.parquet    rows, one a sample

A file appears whole (temporary file, fsync, rename) and its name carries the digest of its content, so a torn one is
seen: its rows are missing. Who fills the table renames it to .damaged; who only reads leaves it, as it may still be
being copied.
"""

import hashlib
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from astar_megatron.data.files import storage_error, write_atomic
from astar_megatron.types import Rollout

COLUMNS = ("uid", "sample", "reward", "response_tokens")  # the small ones, which stay in memory

_LOG = logging.getLogger(__name__)
_WARNED: set[Path] = set()  # damaged shards that were named: a command may open a table more than once
_SCHEMA = pa.schema(
    [
        pa.field("uid", pa.string(), nullable=False),
        pa.field("sample", pa.uint32(), nullable=False),
        pa.field("reward", pa.float64(), nullable=False),  # NaN: the response could not be scored
        pa.field("response", pa.list_(pa.int32()), nullable=False),
        pa.field("response_tokens", pa.int32(), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),  # stop: ended by itself; length: cut by the limit
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("logprob", pa.float64(), nullable=False),  # the engine's, summed over the response, nats
        pa.field("text", pa.string()),  # what the reward read; only where sweep.text asks for it
    ]
)


class Response(NamedTuple):
    """What a row holds beside its reward and text."""

    uid: str
    sample: int
    token_ids: tuple[int, ...]
    truncated: bool
    seed: int
    logprob: float  # NaN where it is not known


class TableError(ValueError):
    """A V* table that can't be used as asked."""


def write_shard(folder: Path, number: int, rollouts: Sequence[Rollout], text: bool) -> tuple[str, pa.Table]:
    """Write scored rollouts as one shard and return its name and small columns; on disk on return.

    Raises StorageError (nothing is left of the shard), TableError for values that don't fit or are not finite.
    """
    rows = _rows(rollouts, text)
    return write_rows(folder, number, rows), rows.select(list(COLUMNS))


def write_rows(folder: Path, number: int, rows: pa.Table) -> str:
    """Write rows of the table's columns as one shard and return its name. Raises StorageError."""
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink, compression="zstd", write_page_checksum=True)
    data = sink.getvalue().to_pybytes()
    name = f"shard-{number:06d}-{hashlib.sha256(data).hexdigest()[:16]}.parquet"
    write_atomic(folder / name, data)
    return name


def read_shard(path: Path, whole: bool, *, sets_aside: bool) -> pa.Table | None:
    """Return the small columns; None for a damaged shard, which is renamed away where the caller `sets_aside` such.

    `whole` checks every byte first; otherwise only the pages that are read are (each has a checksum of its own).
    """
    columns, reason = _read(path, whole)
    if columns is None and sets_aside:
        _LOG.warning("%s: damaged shard set aside, its rows are missing again (%s)", path, reason)
        try:
            path.rename(path.with_suffix(".damaged"))
        except OSError as error:
            _LOG.warning("%s: could not be renamed (%s); ignored", path, error)
    elif columns is None and path not in _WARNED:
        _WARNED.add(path)
        _LOG.warning(
            "%s: damaged shard, its rows count as missing (%s); wait if it is still being copied, else `astar sweep` "
            "sets it aside and draws them again",
            path,
            reason,
        )
    return columns


def read_responses(path: Path) -> Iterator[Response]:
    """Yield the response of each row. Raises TableError for a damaged shard."""
    names = ("uid", "sample", "response", "finish_reason", "seed", "logprob")
    columns, reason = _read(path, whole=False, names=names)
    if columns is None:
        raise TableError(f"{path}: damaged ({reason}); restore it, or remove it and run `astar sweep` again")
    rows = zip(*(column.to_pylist() for column in columns.columns), strict=True)
    for uid, sample, response, finish_reason, seed, logprob in rows:
        yield Response(uid, sample, tuple(response), finish_reason == "length", seed, logprob)


def shard_number(name: str) -> int:
    """Return the number in a shard's name; 0 where there is none."""
    digits = name.split("-")[1]
    return int(digits) if digits.isdecimal() else 0


def _read(path: Path, whole: bool, names: Sequence[str] = COLUMNS) -> tuple[pa.Table | None, str]:
    """Columns of a file, the small ones, or the reason why it is damaged."""
    try:
        with path.open("rb") as file:
            if whole and not path.stem.endswith(hashlib.sha256(file.read()).hexdigest()[:16]):
                return None, "its content does not have the digest of its name"
            # Not pq.read_table, which takes five times as long for a small file.
            parquet = pq.ParquetFile(file, page_checksum_verification=True, read_dictionary=["uid"])
            columns = parquet.read(columns=list(names), use_threads=False)
    except pa.ArrowException as error:
        return None, str(error)
    except FileNotFoundError:
        return None, "it is gone: another job set it aside"
    except OSError as error:
        if error.errno is not None:  # the file system's own; pyarrow reports a bad checksum as an OSError without errno
            raise storage_error(f"{path}: can't read a part of the V* table", error) from error
        return None, str(error)
    if set(columns.column_names) != set(names):
        return None, f"it has the columns {', '.join(columns.column_names)} of {', '.join(names)} only"
    return columns.select(list(names)), ""


def _rows(rollouts: Sequence[Rollout], text: bool) -> pa.Table:
    for rollout in rollouts:
        if rollout.reward is not None and not math.isfinite(rollout.reward):
            raise TableError(
                f"V* table: the reward of sample {rollout.sample} of prompt {rollout.prompt.uid} is "
                f"{rollout.reward}, expected a finite number, or None where it could not be scored"
            )
    try:
        return pa.table(
            {
                "uid": [rollout.prompt.uid for rollout in rollouts],
                "sample": [rollout.sample for rollout in rollouts],
                "reward": [math.nan if rollout.reward is None else rollout.reward for rollout in rollouts],
                "response": [rollout.token_ids for rollout in rollouts],
                "response_tokens": [len(rollout.token_ids) for rollout in rollouts],
                "finish_reason": ["length" if rollout.truncated else "stop" for rollout in rollouts],
                "seed": [rollout.seed for rollout in rollouts],
                "logprob": [rollout.logprob for rollout in rollouts],
                "text": [rollout.text if text else None for rollout in rollouts],
            },
            schema=_SCHEMA,
        )
    except (pa.ArrowException, OverflowError, UnicodeEncodeError) as error:
        raise TableError(
            f"V* table: {len(rollouts)} rollouts don't fit its columns ({error}); sample is uint32, tokens "
            "are int32, seed is int64, reward and logprob are numbers, text is UTF-8"
        ) from error
