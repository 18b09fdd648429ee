"""Folders of models: what lies beside the weights, and how a new one takes the place of an old one."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RECORD = "conversion.json"  # what every export carries: it may be replaced, a folder without it is somebody's own
_COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


class CheckpointError(ValueError):
    """An HF folder that is incomplete, damaged or not the model the plan describes; the message names the file."""


def check_destination(folder: str | Path) -> None:
    """Raise CheckpointError where something lies at `folder` that is not an export: replacing would delete it."""
    folder = Path(folder)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / RECORD).is_file() or any(path.is_dir() for path in folder.iterdir()):
        raise CheckpointError(
            f"{folder} exists and is no export of this project (it has no {RECORD}): choose another place, or remove "
            "it yourself"
        )


def check_apart(folder: str | Path, source: str | Path) -> None:
    """Raise CheckpointError where `folder` is, or lies in, or holds the source: writing would touch what is read."""
    new, old = Path(folder).resolve(), Path(source).resolve()
    if new == old:
        raise CheckpointError(f"{folder} is the source itself: choose another destination")
    if new in old.parents or old in new.parents:
        raise CheckpointError(f"one of {folder} and {source} lies in the other: choose a destination beside the source")


@contextmanager
def replacing(folder: str | Path, num_bytes: int = 0) -> Iterator[Path]:
    """An empty folder beside `folder`, which is synced and takes its place when the block ends well.

    OSError, before anything is written, where there is no room for `num_bytes` or no right to write.

    An export that is there already, known by its conversion.json, is replaced (a kill between the two renames leaves
    the old one as `.NAME.old`). Anything else that is there is refused; after an error all stays as it was.
    """
    folder = Path(folder).resolve()
    check_destination(folder)
    new = folder.with_name(f".{folder.name}.new-{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        new.mkdir()
    except OSError as error:
        raise OSError(error.errno, f"can't write {folder}: {error.strerror}; choose another destination") from error
    try:
        free = shutil.disk_usage(new).free
        if free < num_bytes:
            raise OSError(errno.ENOSPC, f"no room for the {num_bytes:,} bytes of {folder}: {free:,} are free")
        yield new
        for path in (*new.iterdir(), new):
            _sync(path)
        _swap(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def copy_companions(source_folder: Path, folder: Path) -> None:
    """Copies what belongs to a model beside its weights and config.json: tokenizer, template, generation defaults."""
    for name in _COMPANIONS:
        if (source_folder / name).is_file():
            shutil.copyfile(source_folder / name, folder / name)


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return the conversion.json of a folder, None where it has none. CheckpointError if it is damaged."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CheckpointError(f"{folder / RECORD} is no JSON: {error}") from error
    if not isinstance(record, dict):
        raise CheckpointError(f"{folder / RECORD}: expected a JSON object, got {type(record).__name__}")
    return record


def write_json(path: Path, value: object) -> None:
    """Write a JSON file as all of an export are: indented, keys sorted."""
    path.write_text(json_text(value), encoding="utf-8")


def json_text(value: object) -> str:
    """Return what `write_json` writes."""
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def _swap(new: Path, folder: Path) -> None:
    """Puts `new` in the place of `folder`."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
