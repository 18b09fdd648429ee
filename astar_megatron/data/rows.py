"""Rows of data from somewhere else: JSONL and Parquet files, folders of them, and data sets of the Hugging Face hub.

What can't be used is counted and named by its place, all of it at once; nothing is repaired or left out in silence.
"""

import json
import logging
import math
import os
import re
import shlex
import stat
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any, Self

from astar_megatron.data.splits import SPLITS, missing_shards, split_of
from astar_megatron.data.tables import Fields, Table, python_values, shortest_floats

_LOG = logging.getLogger(__name__)
_SUFFIXES = (".jsonl", ".parquet")
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".zip")
_SHOWN = 5  # problems that a message names
_MOST_DIGITS = 400  # of a number; a float has fewer
_BOM = b"\xef\xbb\xbf"
# Each value as it stands, so that numbers keep their digits; line breaks stand between values alone.
_JSON_TO_LINES = (
    "python -c \"import json, re, sys; sys.stdin.reconfigure(encoding='utf-8-sig'); "
    "sys.stdout.reconfigure(encoding='utf-8'); text, end = sys.stdin.read().replace('\\n', ' '), 0; {check}"
    "[print(text[start:(end := json.JSONDecoder().raw_decode(text, start)[1])]) for start in "
    "iter(lambda: re.compile(r'\\s*[][,]?\\s*').match(text, end).end(), len(text))]\" < {{file}} > {{lines}}"
)
_OTHER_KINDS = (  # how a name ends and a file begins that is not read, what it is, and what makes one of it that is
    ("", rb"\x1f\x8b", "compressed by gzip", "gunzip -c < {file} > {plain}"),
    ("", rb"\x28\xb5\x2f\xfd", "compressed by zstd", "zstd -dc < {file} > {plain}"),
    ("", rb"BZh[1-9]", "compressed by bzip2", "bzip2 -dc < {file} > {plain}"),
    ("", rb"\xfd7zXZ\x00", "compressed by xz", "xz -dc < {file} > {plain}"),
    ("", rb"PK\x03\x04", "a zip archive", "python -m zipfile -e {file} {plain}"),
    (r"(?<!\.parquet)$", rb"PAR1", "Parquet under a name that does not end in .parquet", "mv {file} {file}.parquet"),
    ("", rb"\s*\[\s*\{", "a JSON array", _JSON_TO_LINES.format(check="json.loads(text); ")),
    ("", rb"\s*\{\s*\n", "JSON of several lines an object", _JSON_TO_LINES.format(check="")),
    (  # a row of another length than the header's, as after a comma without quotes, ends it
        *(r"\.csv$", rb"(?!\s*\{)", "CSV"),
        "python -c \"import csv, json, sys; sys.stdin.reconfigure(encoding='utf-8-sig', newline=''); "
        "csv.field_size_limit(2**30); head, *rows = csv.reader(sys.stdin); assert len(set(head)) == len(head), head; "
        '[print(json.dumps(dict(zip(head, row, strict=True)))) for row in rows if row]" < {file} > {lines}',
    ),
    (
        *("", rb"ARROW1|\xff\xff\xff\xff", "Arrow as the package datasets saves it"),
        'python -c "import datasets, sys; datasets.Dataset.from_file(sys.argv[1]).to_parquet(sys.argv[2])" '
        "{file} {file}.parquet",
    ),
)


class PromptError(ValueError):
    """Data that can't be used; the message names the file and the lines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row and its place in words ("line 3")."""

    where: str
    fields: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A question with its answer, and its place in words."""

    where: str
    question: str
    answer: str


class Problems:
    """Counts rows that can't be used, and remembers the first few."""

    def __init__(self, source: object) -> None:
        self._source, self.count, self._first = source, 0, list[str]()

    def add(self, where: str, reason: str) -> None:
        self.count += 1
        if self.count <= _SHOWN:
            self._first.append(f"{where}: {reason}")

    def message(self, total: int) -> str:
        """Return the count and the first problems, in words."""
        more = f"\n  and {self.count - _SHOWN} more" if self.count > _SHOWN else ""
        return f"{self._source}: {self.count} of {total} rows can't be used:\n  " + "\n  ".join(self._first) + more

    def refuse(self, total: int) -> None:
        """Raise PromptError if there is any."""
        if self.count:
            raise PromptError(self.message(total))


def read_rows(source: str | Path, problems: Problems, files: Sequence[Path] | None = None) -> list[Row]:
    """Return the rows of a .jsonl or .parquet file, or of `files` of a folder (none: `data_files`), in their order.

    A line that is no JSON object in UTF-8 or has a key twice goes to `problems`. Raises PromptError where nothing can
    be read, and for a folder that lacks a shard or, without `files`, is of several splits; a column of Parquet is read
    when a row is first asked for it, which raises too.
    """
    source = Path(source)
    if files is None:
        files = _files_of_one_split(source) if source.is_dir() else [source]
    if source.is_dir() and (missing := missing_shards(files)):
        raise PromptError(
            f"{source}: {len(missing)} shards are missing: {', '.join(missing[:_SHOWN])}; copy them there too, or name "
            "one file"
        )
    rows = []
    for file in files:
        within = f"{file.relative_to(source)}, " if source.is_dir() else ""
        if words := _other_kind(file):
            raise PromptError(words)
        parquet = file.suffix.lower() == ".parquet"
        rows += _parquet_rows(file, within) if parquet else _json_rows(file, within, problems)
    if not rows and not problems.count:
        raise PromptError(f"{source}: holds no prompt; expected one JSON object a line, or Parquet files")
    return rows


def hub_rows(name: str, subset: str | None, split: str) -> list[Row]:
    """Return the rows of a data set of the hub (or of a local folder), read by the library `datasets`.

    Raises PromptError where the library is missing or can't read it.
    """
    try:
        import datasets  # pyright: ignore[reportMissingImports]  # here: optional, and its import takes seconds
    except ImportError as error:
        raise PromptError(
            f"{name}: needs the package datasets; install astar-megatron[data], or download the files and name their "
            "folder"
        ) from error
    try:
        dataset: Any = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # the library raises many kinds: network, unknown names, damaged files
        raise PromptError(f"{name}: the package datasets can't load it (split {split!r}): {error!r:.500}") from error
    kinds = dataset.features.arrow_schema

    def column(field: str) -> list[Any]:
        try:
            return shortest_floats(dataset[field][:], kinds.field(field).type)
        except Exception as error:  # as above
            raise PromptError(f"{name}: the package datasets can't read the field {field!r}: {error!r:.500}") from error

    return _table_rows(Table(dataset.column_names, column), len(dataset))


def pairs_of(
    rows: Iterable[Row],
    question_field: str,
    answer: Callable[[Mapping[str, Any]], str],
    problems: Problems,
    *,
    remedy: str,
) -> list[Pair]:
    """Return question and answer of each row; one where either can't be read goes to `problems`.

    `remedy` is what a user can do where the question has another field, as "set data.prompt_field".
    """
    pairs = []
    for row in rows:
        try:
            question = text_of(row.fields, question_field, remedy)
            pairs.append(Pair(where=row.where, question=question, answer=answer(row.fields)))
        except PromptError:  # the file is damaged
            raise
        except ValueError as error:
            problems.add(row.where, str(error))
    return pairs


def answer_field(name: str, remedy: str) -> Callable[[Mapping[str, Any]], str]:
    """Return the function that takes a row's field `name`, text or number, as the answer; `remedy` as of `pairs_of`."""
    return lambda fields: text_of(fields, name, remedy, number=True)


def text_of(fields: Mapping[str, Any], name: str, remedy: str, *, number: bool = False) -> str:
    """Return a field as text; a whole number without decimals, where `number` allows one. Raises ValueError."""
    if name not in fields:
        raise ValueError(f"no field {name!r}, only {', '.join(map(repr, fields)) or 'none'}; {remedy}")
    value = fields[name]
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"field {name!r} is {value}, so it is missing; fill it or remove the line")
    if number and isinstance(value, int | float) and not isinstance(value, bool):
        value = _number_text(value)  # as good as its text
    if not isinstance(value, str):
        raise ValueError(f"field {name!r} is {type(value).__name__}, expected text; repair it or {remedy}")
    if not value.strip():
        raise ValueError(f"field {name!r} is empty; fill it or remove the line")
    if not is_text(value):
        raise ValueError(f"field {name!r} holds half a surrogate pair, which is no text; repair it")
    return value


def is_text(value: str) -> bool:
    """Whether a string can be written: JSON may name half a surrogate pair, which is no character."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


class _JsonNumber(float):
    """A number of JSON with its digits as they stand there."""

    def __new__(cls, text: str) -> Self:
        number = super().__new__(cls, text)
        number.text = text
        return number

    text: str


def _number_text(value: float) -> str:
    """A number as a person would write it: 27.0 as 27, 1e-07 as 0.0000001; JSON's with all their digits."""
    if isinstance(value, int):
        return str(value)
    text = value.text if isinstance(value, _JsonNumber) else repr(value)
    exact = Decimal(text)
    if abs(exact.adjusted()) > _MOST_DIGITS:  # 1e-300000000 would be written out
        raise ValueError(f"the number {text:.50} has more than {_MOST_DIGITS} digits; repair it or write it as text")
    return str(int(exact)) if exact == exact.to_integral_value() else format(exact, "f").rstrip("0")


def without_duplicates(pairs: Sequence[Pair], keys: Sequence[object], problems: Problems) -> list[int]:
    """Return the indices of the first pair of each key; all pairs of a key with two answers go to `problems`."""
    groups: defaultdict[object, list[int]] = defaultdict(list)
    for index, key in enumerate(keys):
        groups[key].append(index)
    first = []
    for first_index, *others in groups.values():
        first_pair = pairs[first_index]
        another = next((pairs[i] for i in others if pairs[i].answer != first_pair.answer), None)
        if another is None:
            first.append(first_index)
            continue
        for pair in (first_pair, *(pairs[i] for i in others)):
            problems.add(
                pair.where,
                f"its prompt has two answers, {first_pair.answer!r:.200} ({first_pair.where}) and "
                f"{another.answer!r:.200} ({another.where}); {_cause(first_pair.question, another.question)}",
            )
    return first


def _cause(question: str, other: str) -> str:
    """What to do about one prompt with two answers: one question, or two that became the same tokens."""
    if question == other:
        return f"keep the right one, of two spellings either ({question!r:.200})"
    return (
        f"{question!r:.200} and {other!r:.200} are the same to the model: repair its chat template or its tokenizer, "
        "or leave one out"
    )


def data_files(folder: Path) -> list[Path]:
    """Return the .jsonl and .parquet files below a folder, in order of their names.

    Files that are hidden or of another kind are not read, but logged with their count. Raises PromptError where a
    folder can't be listed, and where a name leads to no regular file (a dangling link, a pipe) or to a linked folder.
    """
    inside, linked = list[Path](), list[Path]()
    for place, folders, names in os.walk(folder, onerror=partial(_refuse_folder, folder)):
        inside += [Path(place, name) for name in names]
        linked += [link for name in folders if (link := Path(place, name)).is_symlink()]
    inside.sort()
    shown = [path for path in inside if not _is_hidden(path, folder)]
    odd = [path for path in linked if not _is_hidden(path, folder)] + [path for path in shown if not path.is_file()]
    if odd:
        names = ", ".join(str(path.relative_to(folder)) for path in odd[:_SHOWN])
        raise PromptError(
            f"{folder}: holds {len(odd)} links to folders or to nothing, or other things that are no files, whose rows "
            f"would be left out: {names}; copy the files there, or remove these"
        )
    files = [path for path in shown if path.suffix.lower() in _SUFFIXES]
    if not files and (remedies := [words for path in shown if (words := _other_kind(path))]):
        raise PromptError(f"{folder}: no .jsonl and no .parquet file in it; " + "; ".join(remedies))
    read = set(files)
    if others := [str(path.relative_to(folder)) for path in inside if path not in read]:
        _LOG.warning("%s: %d other files not read: %s", folder, len(others), ", ".join(others[:_SHOWN]))
    return files


def _files_of_one_split(folder: Path) -> list[Path]:
    """All files of a folder. Raises PromptError where their names are of several splits."""
    files = data_files(folder)
    names = {split_of(file.relative_to(folder)) for file in files}  # of shards also what else comes before their number
    if len(splits := [name for name in names if SPLITS.intersection(re.split("[-._]", name))]) > 1:
        raise PromptError(
            f"{folder}: its files are of the splits {', '.join(sorted(splits))}, all of which would be read; name one "
            f"file or a folder of one split, or write one with astar data hf {shlex.quote(str(folder))} --split NAME"
        )
    return files


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _refuse_folder(folder: Path, error: OSError) -> None:
    """Raise PromptError, but for what is nobody's data: hidden folders, and what mkfs leaves on a disk."""
    place = Path(error.filename)
    if _is_hidden(place, folder) or place.name == "lost+found":
        return
    raise PromptError(f"{error.filename}: can't list the folder: {error.strerror}; make it readable for this user")


def _content(file: Path, size: int = -1) -> bytes:
    """The first `size` bytes of a file, or all. Raises PromptError; a pipe or a device might never end."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise PromptError(f"{file}: is no regular file; write what it gives to one, and name that")
        with file.open("rb") as opened:
            return opened.read(size)
    except OSError as error:
        remedy = pattern_remedy(str(file)) or "check the path, of a run data.path or data.eval_path"
        raise PromptError(f"{file}: can't read the prompts: {error.strerror}; {remedy}") from error


def pattern_remedy(path: str) -> str:
    """Return what to do where a path is a pattern of the shell's; "" where it is none."""
    if not set("*?[").intersection(path):
        return ""
    return "patterns are not expanded: name the folder, whose .jsonl and .parquet files are all read"


def _other_kind(file: Path) -> str:
    """Return what a file of another kind is, with the command that makes one of it that is read; "" for what is."""
    begin = _content(file, 4096).removeprefix(_BOM)
    for end, pattern, kind, command in _OTHER_KINDS:
        if re.search(end, file.name.lower()) and re.match(pattern, begin):
            plain = file.with_suffix("") if file.suffix.lower() in _COMPRESSED else f"{file}.plain"
            places = {"file": file, "plain": plain, "lines": f"{file.with_suffix('')}_lines.jsonl"}
            words = command.format(**{name: shlex.quote(str(place)) for name, place in places.items()})
            return f"{file}: is {kind}, expected one JSON object a line, or Parquet; convert it: {words}"
    return ""


def _json_rows(file: Path, within: str, problems: Problems) -> list[Row]:
    rows = []
    for number, raw in enumerate(_content(file).removeprefix(_BOM).split(b"\n"), start=1):
        where = f"{within}line {number}"
        if not raw.strip():
            continue
        try:
            row = json.loads(raw.decode("utf-8"), object_pairs_hook=_object, parse_float=_JsonNumber)
        except UnicodeDecodeError as error:
            problems.add(where, f"not UTF-8 ({error}); convert the file to UTF-8")
        except (ValueError, RecursionError) as error:
            problems.add(where, f"not JSON ({error}); expected one object a line")
        else:
            if isinstance(row, dict):
                rows.append(Row(where=where, fields=row))
            else:
                problems.add(where, f"expected a JSON object, got {type(row).__name__}")
    return rows


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r} stands twice")
    return fields


def _parquet_rows(file: Path, within: str) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def read(names: list[str]) -> Any:
        try:
            with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
                return parquet.schema_arrow.names, parquet.read(columns=names)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise PromptError(f"{file}: not readable as Parquet: {error}; copy it again") from error

    def column(name: str) -> list[Any]:
        names, table = read([name])
        if (count := names.count(name)) > 1:
            raise PromptError(f"{file}: has {count} columns {name!r}; rename all but one")
        values = table.column(name)
        return shortest_floats(python_values(values), values.type)

    names, table = read([])
    return _table_rows(Table(names, column), len(table), within)


def _table_rows(table: Table, num_rows: int, within: str = "") -> list[Row]:
    return [Row(where=f"{within}row {i + 1}", fields=Fields(table, i)) for i in range(num_rows)]
