"""Where each worker of a session was when its run failed: written among its logs, before the workers are ended.

By py-spy, if it is installed and may look: it sees every Python process. Else by the actors themselves (stacks.py).
"""

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from astar_megatron.cluster.stacks import where

STACKS_FILE = "stacks.txt"
_SPY_SECONDS = 10.0


def write(logs: Path, pids: Iterable[int]) -> None:
    """Write where workers among `pids` are, and how that is known, to STACKS_FILE in `logs`, beside their output."""
    parts = []
    for pid in sorted(pids):
        output = _output_of(pid)
        if not output.startswith("worker-"):
            continue  # Ray's own
        errors = output.removesuffix(".out") + ".err"
        if (spied := _spy(pid)) is not None:
            parts.append(f"process {pid}, by py-spy:\n{spied}")
        elif place := where([pid], [logs / errors]):
            parts.append(f"{place}\n  by faulthandler: all threads at the end of {errors}\n")
    if parts:
        (logs / STACKS_FILE).write_text("\n".join(parts), encoding="utf-8")


def _output_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/fd/1").readlink().name
    return ""


def _spy(pid: int) -> str | None:
    program = shutil.which("py-spy") or shutil.which("py-spy", path=Path(sys.executable).parent)
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if program:
            command = [program, "dump", "--pid", str(pid)]
            spied = subprocess.run(command, capture_output=True, timeout=_SPY_SECONDS, check=True).stdout
            return spied.decode(errors="replace")
    return None
