"""Where a process that does not answer is: the stacks of its threads, written by Python's faulthandler.

That runs in a signal's handler, so it works for a thread that is deep in C++, too. Of this machine's processes only.
"""

import contextlib
import faulthandler
import os
import re
import signal
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

_SIGNAL = signal.SIGUSR2
_SECONDS = 2.0  # for the stacks to be written
_FRAMES = 3  # of a thread, in one line
_FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)$')


def show_on_signal() -> None:
    """Let this process write its stacks to stderr when `where` asks for them."""
    faulthandler.register(_SIGNAL, all_threads=True)


def where(pids: Iterable[int], outputs: Sequence[Path]) -> str:
    """Return in a line where processes are that let themselves be asked; their stacks go to their output.

    `outputs` are the files that they write to.
    """
    words = []
    for pid in sorted(pids):
        status = _status(pid)
        if status.get("State", "").startswith("T"):
            words.append(f"process {pid} is stopped (SIGSTOP)")
        elif int(status.get("SigCgt", "0"), 16) >> (_SIGNAL - 1) & 1:  # else the signal would end it
            with contextlib.suppress(OSError):  # it has just ended, or is another user's by now
                words.append(f"process {pid} is at {_asked(pid, outputs) or 'a place that it does not tell'}")
    return "; ".join(words)


def _status(pid: int) -> dict[str, str]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # it has ended
        return {}
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _asked(pid: int, outputs: Sequence[Path]) -> str:
    before = _text(outputs)
    os.kill(pid, _SIGNAL)
    until, text = time.monotonic() + _SECONDS, ""
    while time.monotonic() < until:
        time.sleep(0.1)
        longer = _text(outputs)
        if text == longer != before:
            break
        text = longer
    return innermost(text[len(before) :])


def _text(outputs: Sequence[Path]) -> str:
    return "".join(path.read_text(encoding="utf-8", errors="replace") for path in outputs if path.name.endswith(".err"))


def innermost(stacks: str) -> str:
    """Return the innermost frames of the main thread in what faulthandler writes, which is the last that it names."""
    thread = re.split(r"^(?:Current thread|Thread) .*$", stacks, flags=re.MULTILINE)[-1]
    frames = [match.groups() for line in thread.splitlines() if (match := _FRAME.match(line))][:_FRAMES]
    return " < ".join(f"{Path(file).name}:{line} {function}" for file, line, function in frames)
