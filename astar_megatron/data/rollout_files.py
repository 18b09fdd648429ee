"""Rollouts on disk: those of each step, `<run_dir>/rollouts/step_<n>.parquet`, and those that a checkpoint holds.

A row a response: whose it is (uid, sample, seed), its tokens with the engine's log-prob of each (nats), its text and
reward, and the versions of the weights that drew it. With seed and `tokens_by_version` it is known what it depends on.
Those of a step have also what a reader wants: the prompt's text and answer, the text of each token, and the log-probs
of each under policy and reference as the step was trained on it (nats).
"""

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from astar_megatron.data.files import make_folder, write_atomic
from astar_megatron.data.run_folder import STEPS, step_name, step_of
from astar_megatron.types import Prompt, Rollout, StepStats

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
_OF_A_STEP = pa.schema(
    [
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("answer", pa.string(), nullable=False),
        pa.field("pieces", pa.list_(pa.string()), nullable=False),  # each token alone; "" for the one that ended it
        pa.field("policy_logprobs", pa.list_(pa.float32()), nullable=False),
        pa.field("reference_logprobs", pa.list_(pa.float32()), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A rollout of a step as a reader sees it; `logratios` are ln pi - ln pi_ref of its tokens (nats)."""

    prompt: str
    answer: str
    text: str
    reward: float | None
    truncated: bool
    sample: int
    first_version: int
    pieces: tuple[str, ...]
    logratios: tuple[float, ...]


class RolloutFiles:
    """The rollouts of the newest `keep` steps of a run, a file a step; None: of all.

    `detokenize` is asked for the text of single tokens, once for each that occurs.
    """

    def __init__(self, run_dir: Path, keep: int | None, detokenize: Callable[[Sequence[int]], str]) -> None:
        self._folder, self._keep = run_dir / FOLDER, keep
        self._detokenize = detokenize
        self._pieces: dict[int, str] = {}  # by token

    def begin(self, step: int) -> None:
        """Remove the files of steps from `step` on, which a resumed run writes again. Raises StorageError."""
        make_folder(self._folder)
        self._remove(path for number, path in paths(self._folder).items() if number >= step)

    def write(self, step: int, rollouts: Sequence[Rollout], stats: StepStats) -> None:
        """Write those of a step with what the step found of them; on disk on return. Raises StorageError."""
        if self._keep != 0:
            columns = _columns(rollouts)
            columns += self._of_a_step(columns[_SCHEMA.get_field_index("token_ids")], rollouts, stats)
            schema = pa.schema([*_SCHEMA, *_OF_A_STEP])
            _write(self._folder / f"{step_name(step)}.parquet", pa.table(columns, schema=schema))
        if self._keep is not None:
            self._remove(path for number, path in paths(self._folder).items() if number <= step - self._keep)

    def _of_a_step(self, tokens: pa.ListArray, rollouts: Sequence[Rollout], stats: StepStats) -> list[pa.Array]:
        token_ids = tokens.values.to_numpy()
        occurs = np.zeros(token_ids.max(initial=-1) + 1, bool)
        occurs[token_ids] = True
        known = np.flatnonzero(occurs).tolist()
        for token in known:
            if token not in self._pieces:
                self._pieces[token] = self._detokenize([token])
        texts = pa.array([self._pieces[token] for token in known], pa.string())
        places = np.cumsum(occurs) - 1  # of each token in `known`: faster than to sort the tokens of a step
        lists = [texts.take(pa.array(places[token_ids]))]
        lists += [pa.array(np.asarray(logprobs)) for logprobs in (stats.token_logprobs, stats.reference_token_logprobs)]
        return [
            pa.array([rollout.prompt.text for rollout in rollouts], pa.string()),
            pa.array([rollout.prompt.answer for rollout in rollouts], pa.string()),
            *(pa.ListArray.from_arrays(tokens.offsets, values) for values in lists),
        ]

    def _remove(self, files: Iterable[Path]) -> None:
        for path in files:
            path.unlink(missing_ok=True)


def paths(folder: Path) -> dict[int, Path]:
    """Return the files of a folder by step, in order."""
    return {step_of(path.name): path for path in sorted(folder.glob(f"{STEPS}.parquet"))}


def write(path: Path, rollouts: Sequence[Rollout]) -> None:
    """Write rollouts to a file, whole or not at all. Raises StorageError."""
    _write(path, pa.table(_columns(rollouts), schema=_SCHEMA))


def _columns(rollouts: Sequence[Rollout]) -> list[pa.Array]:
    columns = [pa.array([rollout.prompt.uid for rollout in rollouts], _SCHEMA.types[0])]
    columns += [_column(field, [getattr(rollout, field.name) for rollout in rollouts]) for field in list(_SCHEMA)[1:]]
    return columns


def _write(path: Path, table: pa.Table) -> None:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    write_atomic(path, sink.getvalue())


def _column(field: pa.Field, values: Sequence[Any]) -> pa.Array:
    """Return a column; that of a list by its elements as one array, which a step of millions of tokens has time for."""
    if field.name not in _LISTS:
        return pa.array(values, field.type)
    offsets = _offsets(values)
    dtype = field.type.value_type.to_pandas_dtype()
    elements = np.fromiter(chain.from_iterable(values), dtype, count=offsets[-1])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(elements), type=field.type)


def _offsets(values: Sequence[Sequence[Any]]) -> np.ndarray:
    return np.cumsum([0, *map(len, values)], dtype=np.int32)


def read(path: Path, prompts: Mapping[str, Prompt]) -> list[Rollout]:
    """Return the rollouts of a file; `prompts` are by uid, and rollouts of others are left out.

    Raises OSError for a file that is not there, and ValueError for one that is damaged.
    """
    rollouts = []
    for row in _read(path, _SCHEMA).to_pylist():
        if (prompt := prompts.get(row.pop("uid"))) is not None:
            rollouts.append(Rollout(prompt=prompt, **row | {name: tuple(row[name]) for name in _LISTS}))
    return rollouts


def num_rows(path: Path) -> int:
    """Return how many rollouts a file has. Raises as `read`."""
    with _damage_named(path):
        return pq.read_metadata(path).num_rows


def _read(path: Path, schema: pa.Schema) -> pa.Table:
    data = path.read_bytes()
    with _damage_named(path):
        file = pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True)
        return file.read(columns=schema.names).select(schema.names).cast(schema)


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, KeyError) as error:  # a bad checksum is an OSError
        raise ValueError(f"{path}: damaged ({error})") from error


def read_step(path: Path, first: int = 0, every: int = 1) -> Iterator[Trained]:
    """Yield every `every`th rollout of a step's file, from number `first` on. Raises as `read`."""
    columns = ("text", "reward", "truncated", "sample", "first_version")
    table = _read(path, pa.schema([*(_SCHEMA.field(name) for name in columns), *_OF_A_STEP]))
    for row in table.take(pa.array(range(first, len(table), every))).to_pylist():
        both = zip(row.pop("policy_logprobs"), row.pop("reference_logprobs"), strict=True)
        logratios = tuple(ours - theirs for ours, theirs in both)
        yield Trained(**row | {"pieces": tuple(row["pieces"]), "logratios": logratios})
