"""Folders of models: what lies beside the weights, and how a new one takes the place of an old one."""

import errno
import fcntl
import glob
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_LOG = logging.getLogger(__name__)

RECORD = "conversion.json"  # what every export carries: it may be replaced, a folder without it is somebody's own
PROGRESS_FILE = "progress.json"  # what lies beside the weights in a checkpoint of training: how they were made
# Every file that a tokenizer of transformers is read from, SentencePiece's, Mistral's and tiktoken's own among them.
_TOKENIZER = re.compile(
    r"(tokenizer(\.[\d.]+)?|tokenizer_config|special_tokens_map|added_tokens|vocab|tekken)\.json"
    r"|(vocab|merges|dict)\.txt|.+\.(model(\.v\w+)?|tiktoken|spm|bpe|codes)"
)
_BESIDE = ("generation_config.json", "chat_template.jinja", "chat_template.json")
_TEMPLATES, _TEMPLATE = "additional_chat_templates", ".jinja"  # the folder of a tokenizer's named chat templates
_CACHED = "models--"  # how the hub's cache begins the name of a model's folder: models--ORG--NAME
# Every other file that an export holds, of either kind.
_EXPORTED = re.compile(
    r"conversion\.json|config\.json|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
    r"|metadata\.json|\.metadata|__\d+_\d+\.distcp"
)
CARD = "README.md"  # of a model; the last line of one that was written here says so, until somebody changes the text
_SEAL = re.compile(r"<!-- written by a program, sha256 of the lines above: ([0-9a-f]{64}) -->\n")
_LOCK, _NEW, _OLD = "lock", "new", "old"  # in the folder that holds a new export until it takes its place
_FEW = 5  # names that a message has


class ModelFolderError(ValueError):
    """An HF folder that is incomplete, damaged or not the model the plan describes; the message names the file."""


def check_destination(folder: str | Path) -> None:
    """Raise ModelFolderError where something lies at `folder` that is not an export: replacing would delete it.

    OSError where nothing can lie there.
    """
    folder = Path(folder)
    try:
        folder.stat()
    except FileNotFoundError:
        return
    except OSError as error:  # a link to itself, a name that is too long, a file in the way
        raise _unwritable(folder, error) from error
    if folder.resolve() == Path.cwd():
        raise ModelFolderError(f"{folder} is the current folder, which would be replaced: choose a folder in it")
    if not os.access(folder, os.W_OK, effective_ids=True):  # else it can't be moved out of the way
        raise _unwritable(folder, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if not (folder / RECORD).is_file() or any(path.is_dir() and path.name != _TEMPLATES for path in folder.iterdir()):
        raise ModelFolderError(
            f"{folder} exists and is no export of this project (it has no {RECORD}): choose another place, or remove "
            "it yourself"
        )
    if others := strangers(folder):
        changed = f" ({CARD} was changed by hand)" if CARD in others else ""
        raise ModelFolderError(
            f"{folder} is an export, but holds files that no export has: {first_few(others)}{changed}; "
            "to replace it would delete them: move them away, or choose another place"
        )


def strangers(folder: Path) -> list[str]:
    """Return the names of the files of an export that are somebody's own, a card too that was changed by hand."""
    templates = folder / _TEMPLATES
    beside = (path.name for path in folder.iterdir() if path != templates or not path.is_dir())
    names = sorted([*beside, *(f"{_TEMPLATES}/{path.name}" for path in templates.glob("*"))])
    own = {name for name in names if _is_companion(name) or _EXPORTED.fullmatch(name)}
    others = [name for name in names if name not in own or (folder / name).is_dir()]
    return [name for name in others if name != CARD or not is_sealed(folder / CARD)]


def first_few(names: Sequence[str]) -> str:
    """Return a list for a message: the first names, and how many more there are."""
    return ", ".join(names[:_FEW]) + (f" and {len(names) - _FEW} more" if len(names) > _FEW else "")


def files(folder: Path) -> list[str]:
    """Return the files of a folder and of those in it, by their paths in it, sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def model_name(folder: Path) -> str:
    """Return the name of a model's folder: the hub's, ORG/NAME, where it lies in the hub's cache, else the folder's."""
    folder = folder.resolve()
    cached = [part.removeprefix(_CACHED) for part in folder.parts if part.startswith(_CACHED)]
    return cached[-1].replace("--", "/", 1) if cached else folder.name


def _is_companion(name: str) -> bool:
    parent, _, template = name.rpartition("/")
    if parent:
        return parent == _TEMPLATES and template.endswith(_TEMPLATE)
    return name in _BESIDE or _TOKENIZER.fullmatch(name) is not None


def companions(folder: Path) -> list[str]:
    """Return what belongs to a model beside weights and config.json: tokenizer, templates, generation defaults, sorted.

    ModelFolderError for a link to what is not there, as a copy of a part of the hub's cache has them, and for one that
    leads out of the folder: whoever made the model could have any file of this machine copied.
    """
    paths = {path.relative_to(folder).as_posix(): path for path in (*folder.glob("*"), *folder.glob(f"{_TEMPLATES}/*"))}
    own = {name: path for name, path in sorted(paths.items()) if _is_companion(name)}
    for path in own.values():
        if not path.exists():
            raise ModelFolderError(f"{path} names {path.readlink()}, which is missing: copy it there too")
        if not _belongs_to(path, folder.resolve()):
            raise ModelFolderError(
                f"{path} is a link to {path.resolve()}, outside the model's folder: if it is the model's, copy the "
                "file there in place of the link"
            )
    return [name for name, path in own.items() if path.is_file()]


def _belongs_to(path: Path, folder: Path) -> bool:
    """Whether a file of a model's folder lies there, or among the files of the model that the hub's cache links to."""
    file = path.resolve()
    caches = [parent for parent in folder.parents if parent.match(f"{_CACHED}*/snapshots")]
    blobs = [(snapshots.parent / "blobs").resolve() for snapshots in caches]  # may be a link to another disk
    return file.is_relative_to(folder) or file.parent in blobs


def tokenizer_files(folder: Path) -> list[str]:
    """Return the names of the files that a model's tokenizer is read from, sorted. ModelFolderError as `companions`."""
    return [name for name in companions(folder) if _TOKENIZER.fullmatch(name)]


def companion_bytes(folder: Path) -> int:
    """Return the size of all `companions`. ModelFolderError as there."""
    return sum((folder / name).stat().st_size for name in companions(folder))


def sealed(text: str) -> str:
    """Return a card with a last line that says that a program wrote what is above it."""
    return f"{text}<!-- written by a program, sha256 of the lines above: {_digest(text)} -->\n"


def is_sealed(path: Path) -> bool:
    """Return whether a file is a card that nobody has changed since a program wrote it."""
    if not path.is_file():
        return False
    text, _, seal = path.read_text(encoding="utf-8", errors="replace").rpartition("<!--")
    match = _SEAL.fullmatch(f"<!--{seal}")
    return match is not None and match[1] == _digest(text)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()


def free_bytes(folder: str | Path) -> int:
    """Return how much room there is for `folder`. OSError where it can't be written, as `replacing` would find."""
    folder = Path(folder).resolve()
    place = next(path for path in folder.parents if path.exists())
    try:
        Path(tempfile.mkdtemp(prefix=f".{folder.name}.try-", dir=place)).rmdir()
    except OSError as error:
        raise _unwritable(folder, error) from error
    return shutil.disk_usage(place).free


def check_apart(folder: str | Path, source: str | Path) -> None:
    """Raise ModelFolderError where `folder` is, or lies in, or holds the source: writing would touch what is read."""
    new, old = Path(folder).resolve(), Path(source).resolve()
    if new == old:
        raise ModelFolderError(f"{folder} is the source itself: choose another destination")
    if new in old.parents or old in new.parents:
        raise ModelFolderError(
            f"one of {folder} and {source} lies in the other: choose a destination beside the source"
        )


@contextmanager
def replacing(folder: str | Path, num_bytes: int = 0) -> Iterator[Path]:
    """An empty folder beside `folder`, which is synced and takes its place when the block ends well.

    OSError, before anything is written, where there is no room for `num_bytes` or no right to write.

    An export that is there already, known by its conversion.json, is replaced; anything else that is there is refused,
    and so is an export with somebody's files in it. After an error all stays as it was. What a killed process leaves is
    removed by the next that writes to the same place; an export it had taken out of the way is put back.
    """
    folder = Path(folder).resolve()
    check_destination(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_wrecks(folder)
        place, lock = _locked_place(folder)
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        free = shutil.disk_usage(place).free
        if free < num_bytes:
            raise OSError(errno.ENOSPC, f"no room for the {num_bytes:,} bytes of {folder}: {free:,} are free")
        new = place / _NEW
        new.mkdir()
        yield new
        sync(new)
        check_destination(folder)  # somebody may have put something there by now
        _swap(place, folder)
    finally:
        shutil.rmtree(place, ignore_errors=True)
        os.close(lock)


def _unwritable(folder: Path, error: OSError) -> OSError:
    return OSError(error.errno, f"can't write {folder}: {error.strerror}; choose another destination")


def _locked_place(folder: Path) -> tuple[Path, int]:
    """A new folder beside `folder`, and the descriptor that locks it as long as this process lives."""
    while True:
        place = Path(tempfile.mkdtemp(prefix=f".{folder.name}.new-", dir=folder.parent))
        lock = os.open(place / _LOCK, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:  # a file system without locks, where nobody removes wrecks
            return place, lock
        if (place / _LOCK).exists():  # else another process came between, and took it for a wreck
            return place, lock
        os.close(lock)


def _remove_wrecks(folder: Path) -> None:
    """Removes what killed processes left beside `folder`: their locks are free."""
    for lock_file in folder.parent.glob(f".{glob.escape(folder.name)}.new-*/{_LOCK}"):
        place = lock_file.parent
        try:
            lock = os.open(lock_file, os.O_RDWR)
        except OSError:  # gone, or another user's
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if (place / _OLD).exists() and not folder.exists():
                (place / _OLD).rename(folder)
                _LOG.warning("%s is put back, which a killed process was replacing", folder)
            shutil.rmtree(place)
            _LOG.warning("removed %s, which a killed process had left", place)
        except OSError:
            continue  # it is being written, or the file system has no locks
        finally:
            os.close(lock)


def copy_companions(source_folder: Path, folder: Path) -> None:
    """Copies all `companions`. ModelFolderError as there; an OSError names the file that can't be read or written."""
    for name in companions(source_folder):
        try:
            content = (source_folder / name).read_bytes()
        except OSError as error:
            raise OSError(error.errno, f"can't read {source_folder / name}: {error.strerror}") from error
        try:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        except OSError as error:
            raise _unwritable(folder / name, error) from error


def read_record(folder: Path, name: str = RECORD) -> dict[str, Any] | None:
    """Return the conversion.json of a folder, or the JSON of `name`; None without one. ModelFolderError if damaged."""
    try:
        record = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ModelFolderError(f"{folder / name} can't be read: {error.strerror}; remove it") from error
    except (ValueError, RecursionError) as error:
        raise ModelFolderError(f"{folder / name} is no JSON: {error}: remove it if the weights are sound") from error
    if not isinstance(record, dict):
        raise ModelFolderError(f"{folder / name}: expected a JSON object, got {type(record).__name__}")
    return record


def add_to_record(folder: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the conversion.json of a folder with `fields`, as it is written now: whole at any time.

    ModelFolderError if it is damaged, OSError where it can't be written.
    """
    record = (read_record(folder) or {}) | dict(fields)
    new = folder / f".{RECORD}.{os.getpid()}.tmp"
    try:
        write_json(new, record)
        _sync(new)
        new.replace(folder / RECORD)
        _sync(folder)
    except OSError as error:
        raise OSError(error.errno, f"can't write {folder / RECORD}: {error.strerror}") from error
    finally:
        new.unlink(missing_ok=True)
    return record


def write_json(path: Path, value: object) -> None:
    """Write a JSON file as all of an export are: indented, keys sorted."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _swap(place: Path, folder: Path) -> None:
    """Puts the new export of `place` where `folder` is, which goes to `place`."""
    old = place / _OLD
    try:
        if folder.exists():
            (place / _NEW).chmod(stat.S_IMODE(folder.stat().st_mode))  # who keeps an export private goes on to
            folder.rename(old)
        (place / _NEW).rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    _sync(folder.parent)


def sync(folder: Path) -> None:
    """Wait until the files of a folder, and it itself, are on the disk."""
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
