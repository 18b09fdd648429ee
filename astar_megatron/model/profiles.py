"""Traces of torch's profiler on disk: Chrome's JSON, compressed, whole or absent.

torch's own export to .gz is left out: it writes beside the system's temporary files, and a full disk there or here
leaves half a trace without an error.
"""

import gzip
import shutil
from collections.abc import Callable
from pathlib import Path

from astar_megatron.data.files import StorageError, make_folder, storage_error, sync, tail
from astar_megatron.types import Trace

_LEVEL = 3  # of 9: the ranks wait for it
_END_BYTES = 8192  # of a trace, in which its last key is: a path


def write_trace(export: Callable[[str], object], path: Path) -> Trace:
    """Write a trace to `path`, over an earlier one; a disk without room is named in what is returned.

    `export` writes it as JSON to the file of a name, once: the `export_chrome_trace` of a profiler that has stopped.
    """
    temporary = path.with_name(f".{path.name}.incomplete")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a rank that was killed
        make_folder(temporary)
        try:
            plain, compressed = temporary / "plain.json", temporary / "compressed"
            export(str(plain))
            _check_whole(plain)
            with plain.open("rb") as source, gzip.open(compressed, "wb", compresslevel=_LEVEL) as target:
                shutil.copyfileobj(source, target, 1 << 20)
            sync(compressed)
            compressed.replace(path)
            sync(path.parent)
            return Trace(path=str(path), num_bytes=path.stat().st_size)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except StorageError as error:
        return Trace(path=str(path), problem=str(error))
    except OSError as error:
        return Trace(path=str(path), problem=str(storage_error(f"{path}: can't write the trace", error)))


def _check_whole(plain: Path) -> None:
    """Raise StorageError where a trace has no end: the profiler writes it, and tells nobody of a full disk."""
    end = tail(plain, _END_BYTES).rstrip() if plain.exists() else b""
    if b'"traceName"' not in end or not end.endswith(b"}"):
        raise StorageError(f"{plain.parent.parent}: no room for a trace before it is compressed; free some space there")
