"""The stacks of a run's processes, written among its logs before they are ended: where each was when the run failed.

By py-spy, if it is installed and may look: it sees every Python process. Else by the actors themselves, whose own
stacks faulthandler writes to their output on SIGUSR2, whatever they are doing.
"""

import contextlib
import faulthandler
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

STACKS_FILE = "stacks.txt"
_SPY_SECONDS = 10.0
_OWN_SECONDS = 0.5  # for an actor to write its stacks


def answer() -> None:
    """Make this process, an actor's, write the stacks of its threads to its output on SIGUSR2."""
    faulthandler.register(signal.SIGUSR2, file=2)


def write(logs: Path, pids: Iterable[int]) -> None:
    """Write the stacks of workers among `pids` to `logs`, where their output is, and say there by which way."""
    parts, asked = [], False
    for pid in sorted(pids):
        output = _output_of(pid)
        if not output.startswith("worker-"):
            continue  # Ray's own
        if (spied := _spy(pid)) is not None:
            parts.append(f"process {pid} ({output}), by py-spy:\n{spied}")
        elif _answers(pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR2)
                asked = True
                parts.append(f"process {pid}, by faulthandler: at the end of {output.removesuffix('.out')}.err\n")
    if asked:
        time.sleep(_OWN_SECONDS)
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
            return subprocess.run(command, capture_output=True, text=True, timeout=_SPY_SECONDS, check=True).stdout
    return None


def _answers(pid: int) -> bool:
    """Whether a process catches SIGUSR2; one that does not would end by it."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (signal.SIGUSR2 - 1) & 1)
    return False
