"""Where rows of prompts come from, files of this machine or the hub, and what they must not overwrite."""

import logging
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from astar_megatron.data.rows import Problems, PromptError, Row, data_files, hub_rows, pattern_remedy, read_rows
from astar_megatron.data.splits import SPLITS, TRAIN, split_of
from conversion.folders import first_few

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RowSource:
    """Where a user asked for rows: a file or folder of this machine, else a data set of the hub.

    `kind` is of `astar data`: jsonl is always a file. `subset` and `split` are the hub's; of a folder, their files.
    """

    place: str
    kind: str = "jsonl"
    subset: str | None = None
    split: str | None = None


def rows_of(asked: RowSource, problems: Problems, *, known_subset: str | None = None) -> list[Row]:
    """Return the rows of a source; `known_subset` is the data set's own where none is asked for. Raises PromptError."""
    source, subset, split = asked.place, asked.subset, asked.split
    place = Path(source)
    if asked.kind == "jsonl" or (place.exists() and not place.is_dir()):
        if options := [f"--{name} {value}" for name, value in (("split", split), ("subset", subset)) if value]:
            raise PromptError(f"{source}: {' and '.join(options)}: one file is read whole; leave that out")
        return read_rows(source, problems)
    if place.is_dir():
        return read_rows(source, problems, _files_of(place, subset, split, known_subset))
    if remedy := pattern_remedy(source):
        raise PromptError(f"{source}: no such file or folder; {remedy}")
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or place.suffix in (".jsonl", ".parquet"):
        raise PromptError(f"{source}: no such file or folder, and no name of the hub (owner/name)")
    return hub_rows(source, subset or known_subset, split or TRAIN)


def _files_of(folder: Path, subset: str | None, split: str | None, known_subset: str | None) -> list[Path]:
    """The files of a subset and a split, as a download from the hub has them. Raises PromptError."""
    name = subset or known_subset or ""
    inside = folder / name if (folder / name).is_dir() else folder
    if subset and inside == folder:
        raise PromptError(
            f"{folder}: --subset {subset}: there is no such folder in it; leave that out, or name another"
        )
    files, wanted = data_files(inside), split or TRAIN
    splits: defaultdict[str, list[Path]] = defaultdict(list)
    for file in files:
        splits[split_of(file.relative_to(inside), split)].append(file)
    if not files or (split is None and len(splits) == 1 and not SPLITS.intersection(splits)):
        return files
    chosen = splits.get(wanted, [])
    if not chosen:
        raise PromptError(
            f"{inside}: has no file of the split {wanted} ({wanted}.jsonl, {wanted}-00000-of-00001.parquet), but "
            f"{_listed(files, inside)}; choose with --split, or name one of them"
        )
    if split is None and splits[""]:
        raise PromptError(
            f"{inside}: beside {_listed(chosen, inside)} there are files whose split is not known, "
            f"{_listed(splits[''], inside)}; say --split {TRAIN} for the former alone, or name one file"
        )
    if len({file.parent for file in chosen}) > 1:
        raise PromptError(f"{inside}: {_listed(chosen, inside)} lie in several folders; name one of the folders")
    if len(chosen) < len(files):
        _LOG.warning("%s: %d of %d files are of the split %s and read", inside, len(chosen), len(files), wanted)
    return chosen


def _listed(files: Iterable[Path], folder: Path) -> str:
    return first_few([str(file.relative_to(folder)) for file in files])


def refuse_no_file(key: str, path: Path) -> None:
    """Raise PromptError where something lies at the path of configuration key or option `key` that is no file."""
    if path.is_dir():
        raise PromptError(f"{key}: {str(path)!r} is a folder; name a file in it")
    if path.exists() and not path.is_file():
        raise PromptError(f"{key}: {path} is no regular file; name a file that this program may write")


def refuse_other(key: str, path: Path, data: bytes) -> None:
    """Raise PromptError where the file of configuration key or option `key` holds other prompts than `data`."""
    refuse_no_file(key, path)
    if path.exists() and path.read_bytes() != data:
        raise PromptError(f"{key}: {path} is there with other prompts; remove it or choose another path")
