"""The manifest of a folder: size and digest of every file in it, written last. A folder that fits it is whole.

    {"files": {"__0_0.distcp": {"bytes": 123, "xxh3_128": "9f4c..."}, ...}}

XXH3-128 reads several GB/s a core. It finds what disks, copies and cut writes do to files; a forger it does not stop.
"""

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import xxhash

from astar_megatron.data.files import write_json

MANIFEST_FILE = "manifest.json"
_CHUNK_BYTES = 4 << 20
_MAX_THREADS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class FileDigest:
    """What a manifest says of a file."""

    num_bytes: int
    xxh3_128: str  # hexadecimal


def digest_of(path: Path) -> FileDigest:
    """Return size and digest of a file as it is now."""
    digest, buffer, num_bytes = xxhash.xxh3_128(), memoryview(bytearray(_CHUNK_BYTES)), 0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            num_bytes += count
    return FileDigest(num_bytes=num_bytes, xxh3_128=digest.hexdigest())


def digests_of(folder: Path, names: Sequence[str]) -> dict[str, FileDigest]:
    """Return size and digest of files of a folder, by their names; several are read side by side."""
    with _threads() as threads:
        return dict(zip(names, threads.map(lambda name: digest_of(folder / name), names), strict=True))


def write_manifest(folder: Path, known: Mapping[str, FileDigest]) -> None:
    """Write the manifest of `folder`. Files in `known` are not read again. Raises StorageError."""
    digests = {**known, **digests_of(folder, [name for name in _names(folder) if name not in known])}
    entries = {name: {"bytes": each.num_bytes, "xxh3_128": each.xxh3_128} for name, each in sorted(digests.items())}
    write_json(folder / MANIFEST_FILE, {"files": entries})


def problems(folder: Path) -> list[str]:
    """Return in words which files of `folder` are not as its manifest says; [] for a whole one.

    All files are read, several side by side. Others that lie there are not looked at.
    """
    if not (folder / MANIFEST_FILE).is_file():
        return [f"{MANIFEST_FILE} is missing, or no regular file"]
    try:
        wanted = {
            str(name): FileDigest(num_bytes=int(entry["bytes"]), xxh3_128=str(entry["xxh3_128"]))
            for name, entry in json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))["files"].items()
        }
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        return [f"{MANIFEST_FILE} can't be read ({type(error).__name__}: {error})"]
    with _threads() as threads:
        by_file = threads.map(lambda name: _problem(folder / name, name, wanted[name]), sorted(wanted))
        return [problem for problem in by_file if problem]


def strangers(folder: Path) -> list[str]:
    """Return the files of a whole folder that are not in its manifest."""
    known = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))["files"]
    return [name for name in _names(folder) if name not in known]


def _names(folder: Path) -> list[str]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST_FILE)
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1))


def _problem(path: Path, name: str, wanted: FileDigest) -> str | None:
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        return f"{name!r} is no name of a file in it"
    try:
        if path.exists() and not path.is_file():
            return f"{name} is no regular file"
        num_bytes = path.stat().st_size
        if num_bytes != wanted.num_bytes:
            return f"{name} has {num_bytes} bytes instead of {wanted.num_bytes}"
        digest = digest_of(path)
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} can't be read ({error.strerror})"
    return None if digest == wanted else f"{name} holds other bytes than were written"
