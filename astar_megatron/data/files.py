"""Files that are either whole or absent, whatever stops the process while it writes them."""

import errno
import fcntl
import io
import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


class StorageError(OSError, ValueError):
    """The file system refused; the message names the path, the reason and what to change."""


def write_atomic(path: str | Path, data: bytes, *, replace: bool = True) -> None:
    """Write `data` to `path`, replacing what is there: temporary file beside it, fsync, rename, fsync of the folder.

    A link stays, and what it names is written. Without `replace` the first of several writers wins, and what is there
    stays (a hard link instead of the rename).
    Raises StorageError (full disk, read-only folder, missing folder); `path` is then as it was before.
    """
    place = Path(os.path.realpath(path))
    temporary = place.with_name(f".{place.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if replace:
                temporary.replace(place)
            else:
                with suppress(FileExistsError):
                    os.link(temporary, place)
            sync(place.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise storage_error(f"{path}: can't write {len(data)} bytes", error) from error


def write_json(path: Path, tree: Mapping[str, Any], *, replace: bool = True) -> None:
    """Write a tree as JSON, indented, as `write_atomic` does."""
    write_atomic(path, (json.dumps(tree, indent=1) + "\n").encode(), replace=replace)


def tail(path: Path, num_bytes: int) -> bytes:
    """Return the last bytes of a file, or all that it has. Raises OSError."""
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - num_bytes))
        return file.read()


def write_figure(path: Path, figure: Any) -> None:
    """Draw a figure of matplotlib into an image file, in the format of its ending, as `write_atomic` does."""
    image = io.BytesIO()
    figure.savefig(image, format=path.suffix.removeprefix("."))
    write_atomic(path, image.getvalue())


def make_folder(path: str | Path) -> None:
    """Create `path` and its parents where absent. Raises StorageError."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(f"{path}: can't create the folder", error) from error


def refusal_at(path: str | Path) -> str | None:
    """Return why nothing can be made at a path, by what is there of it and above it; None where it can. Makes nothing.

    What root may write into and yet holds no folders, as /proc, is not known.
    """
    there = next(place for place in (Path(path).absolute(), *Path(path).absolute().parents) if os.path.lexists(place))
    if os.access(there, os.W_OK | os.X_OK) and there.is_dir():
        return None
    return f"{there} is no folder that you may write to"


def storage_error(problem: str, error: OSError) -> StorageError:
    """Return a StorageError that adds to `problem` the system's reason and what to change."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        advice = "free some space there and run the same command again: what was written before is kept"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        advice = "make the folder writable for this user or choose another one"
    else:
        advice = "choose another folder"
    return StorageError(f"{problem}: {error.strerror or error}; {advice}")


@contextmanager
def exclusive(path: Path, program: str) -> Iterator[None]:
    """Hold a lock file while the block runs; a lock ends with its process.

    Raises StorageError where `program` holds it, and where the file system has no locks.
    """
    try:
        file = path.open("a")
    except OSError as error:
        raise storage_error(f"{path}: can't lock it", error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageError(f"{path}: {program} is running; wait for its end or choose another run_dir") from None
        except OSError as error:
            raise StorageError(
                f"{path}: can't lock it: {error.strerror}; have its file system mounted with locks that all nodes see "
                "(Lustre: -o flock), or choose another run_dir"
            ) from error
        yield


def sync(path: Path) -> None:
    """Bring a file, or a folder's list of names, to disk."""
    # Without it a crash of the machine can forget the rename although the file's bytes are on disk.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def without_nan(value: Any) -> Any:
    """Return a tree of plain values with null for the numbers that JSON does not have: NaN and the infinities."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
