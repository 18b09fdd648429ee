"""Rollouts on disk: those of each step, `<run_dir>/rollouts/step_<n>.parquet`, and those that a checkpoint holds.

A row a response: whose it is (uid, sample, seed), its tokens with the engine's log-prob of each (nats), its text and
reward, and the versions of the weights that drew it. With seed and `tokens_by_version` it is known what it depends on.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from astar_megatron.data.files import make_folder, write_atomic
from astar_megatron.types import Prompt, Rollout

FOLDER = "rollouts"
_SCHEMA = pa.schema(
    [
        pa.field("uid", pa.string(), nullable=False),
        pa.field("sample", pa.int64(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("truncated", pa.bool_(), nullable=False),
        pa.field("token_logprobs", pa.list_(pa.float64()), nullable=False),  # float64: read back as they were
        pa.field("first_version", pa.int64(), nullable=False),
        pa.field("last_version", pa.int64(), nullable=False),
        pa.field("tokens_by_version", pa.list_(pa.int32()), nullable=False),
        pa.field("reward", pa.float64()),  # null: scoring failed
    ]
)
_LISTS = ("token_ids", "token_logprobs", "tokens_by_version")


class RolloutFiles:
    """The rollouts of the newest `keep` steps of a run, a file a step; None: of all."""

    def __init__(self, run_dir: Path, keep: int | None) -> None:
        self._folder, self._keep = run_dir / FOLDER, keep

    def begin(self, step: int) -> None:
        """Remove the files of steps from `step` on, which a resumed run writes again. Raises StorageError."""
        make_folder(self._folder)
        self._remove(number for number in self._steps() if number >= step)

    def write(self, step: int, rollouts: Sequence[Rollout]) -> None:
        """Write those of a step; they are on disk on return. Raises StorageError."""
        if self._keep != 0:
            write(self._path(step), rollouts)
        if self._keep is not None:
            self._remove(number for number in self._steps() if number <= step - self._keep)

    def _steps(self) -> list[int]:
        stems = [path.stem.removeprefix("step_") for path in self._folder.glob("step_*.parquet")]
        return sorted(int(stem) for stem in stems if stem.isdigit())

    def _path(self, step: int) -> Path:
        return self._folder / f"step_{step:08d}.parquet"

    def _remove(self, steps: Iterable[int]) -> None:
        for step in steps:
            self._path(step).unlink(missing_ok=True)


def write(path: Path, rollouts: Sequence[Rollout]) -> None:
    """Write rollouts to a file, whole or not at all. Raises StorageError."""
    columns = [pa.array([rollout.prompt.uid for rollout in rollouts], _SCHEMA.types[0])]
    columns += [_column(field, [getattr(rollout, field.name) for rollout in rollouts]) for field in list(_SCHEMA)[1:]]
    sink = io.BytesIO()
    pq.write_table(pa.table(columns, schema=_SCHEMA), sink, compression="zstd", write_page_checksum=True)
    write_atomic(path, sink.getvalue())


def _column(field: pa.Field, values: Sequence[Any]) -> pa.Array:
    """Return a column; that of a list by its elements as one array, which a step of millions of tokens has time for."""
    if field.name not in _LISTS:
        return pa.array(values, field.type)
    offsets = np.cumsum([0, *map(len, values)], dtype=np.int32)
    dtype = field.type.value_type.to_pandas_dtype()
    elements = np.fromiter(chain.from_iterable(values), dtype, count=offsets[-1])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(elements), type=field.type)


def read(path: Path, prompts: Mapping[str, Prompt]) -> list[Rollout]:
    """Return the rollouts of a file; `prompts` are by uid, and rollouts of others are left out.

    Raises OSError for a file that is not there, and ValueError for one that is damaged.
    """
    data = path.read_bytes()
    try:
        rows = pq.read_table(io.BytesIO(data), page_checksum_verification=True).cast(_SCHEMA).to_pylist()
    except (pa.ArrowException, OSError) as error:  # a bad checksum is an OSError
        raise ValueError(f"{path}: damaged ({error})") from error
    rollouts = []
    for row in rows:
        if (prompt := prompts.get(row.pop("uid"))) is not None:
            rollouts.append(Rollout(prompt=prompt, **row | {name: tuple(row[name]) for name in _LISTS}))
    return rollouts
