"""What a node of a cluster says of itself before a run starts: packages, GPUs, space, the folder that all share."""

import contextlib
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from astar_megatron.cluster.cores import available_cores
from astar_megatron.cluster.nodes import appears
from astar_megatron.run import machine
from astar_megatron.run.resources import free_bytes, shared_memory_bytes

_QUERY = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFacts:
    """The facts. `versions` are packages' (machine.versions), `gpus` the models by name, `driver` the GPUs' driver.

    `cores` are those that processes of the run may use there.
    `disk_bytes` and `shared_memory_bytes` are free in the folder for temporary files and in /dev/shm. `reads` says
    whether the node sees what the driver has written, and `wrote` names the file that it has written for the driver.
    """

    versions: Mapping[str, str]
    gpus: tuple[str, ...]
    driver: str
    cores: float
    disk_bytes: int
    shared_memory_bytes: int
    reads: bool
    wrote: str


def measure(folder: str, mark: str) -> NodeFacts:
    """Return the facts of the node on which this is called; `mark` is the name of a file in `folder`, and its text."""
    lines = _gpu_lines()
    wrote = ""
    with contextlib.suppress(OSError):
        name = secrets.token_hex(8)
        (Path(folder) / name).write_text(name, encoding="utf-8")
        wrote = name
    return NodeFacts(
        versions=machine.versions(),
        gpus=tuple(line.partition(", ")[0] for line in lines),
        driver=lines[0].partition(", ")[2] if lines else "",
        cores=available_cores(),
        disk_bytes=free_bytes(Path(tempfile.gettempdir())),
        shared_memory_bytes=shared_memory_bytes(),
        reads=appears(folder, mark),
        wrote=wrote,
    )


@contextlib.contextmanager
def marked(folder: Path) -> Iterator[tuple[Path, str]]:
    """Make a folder below `folder`, in which nodes write for each other, and a file in it named by its text."""
    inner = folder / f".astar-preflight-{secrets.token_hex(8)}"
    inner.mkdir()
    try:
        mark = secrets.token_hex(8)
        (inner / mark).write_text(mark, encoding="utf-8")
        yield inner, mark
    finally:
        shutil.rmtree(inner, ignore_errors=True)


def _gpu_lines() -> list[str]:
    """A line a GPU: its name and its driver's version; none where nothing reports them."""
    try:
        done = subprocess.run(_QUERY, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.strip().splitlines()
