"""How a process ended, in one line: by its exit status, by what it wrote last, and by what the kernel counts.

Ray says of most ends only that a connection broke, and vLLM that its core failed; what happened stands in the output
of the process.
"""

import contextlib
import re
import signal
from collections.abc import Iterable
from pathlib import Path

from astar_megatron.cluster.cgroups import group_folders, read_text
from astar_megatron.data.files import tail

_LONGEST = 1000  # characters of a cause
_TAIL_BYTES = 256 << 10  # of an output that is read: a traceback of every worker fits
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
# What vLLM's logger puts before each line of a traceback: (EngineCore pid=7) ERROR 11-28 00:24:04 [core.py:1510]
_PREFIX = re.compile(r"^(?:\([^()]* pid=\d+\) )?(?:ERROR|CRITICAL|WARNING) [\d-]+ [\d:]+ \[[^\]]*\] ")
_NO_WORD = "vLLM's core ended and left no word"
_ERROR = re.compile(
    r"^(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Exit|Expired|Refused)\b(?::.*)?$"
    r"|^terminate called "
)
_KILLED = re.compile(
    r"^\*{3} SIG[A-Z]+ received|^Fatal Python error: "  # by the handlers that Ray and Python install
    r"|died unexpectedly \(exit code: -|^[\w ]+ was killed by "  # as vLLM says it of its workers, and `ended`
    rf"|^{_NO_WORD}$"
)
_ENDED_BY_RAY = re.compile(r"Failed to register worker to Raylet|Failed to connect to GCS within \d+ seconds")
_LOST_RAYLET = "Raylet is terminated."  # in the output of the driver, followed by the tail of the raylet's log
_LEFT = re.compile(r"died unexpectedly \(exit code: |^[\w ]+ ended with exit status [1-9]")
# Errors that only point to another, or that follow from it.
_SECONDARY = re.compile(
    r"root cause|stack trace|background process|EngineDeadError|CancelledError|BrokenPipeError|ConnectionResetError"
    r"|ContextTerminated|RuntimeError: cancelled$|Engine core initialization failed|ActorDiedError|KeyboardInterrupt"
    r"|SystemExit|^EOFError$"
)
_MEANINGS: dict[int, str] = {
    signal.SIGKILL: " (so ends the kernel a process for memory)",
    signal.SIGXCPU: " (so ends the kernel a process that has used up its CPU time)",
}
_CORE_STATUSES = re.compile(r"Failed core proc\(s\): \{([^}]*)\}")


def ended(status: int) -> str:
    """Return in words how a process ended, from its return code as `subprocess` and `multiprocessing` give it."""
    if status >= 0:
        return f"ended with exit status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    return f"was killed by {name}{_MEANINGS.get(-status, '')}"


def last_error(text: str) -> str | None:
    """Return the last error in the output of a process and its children, without what only points to another.

    What follows the first child that was killed follows from that.
    """
    error = left = None
    for line in _COLOURS.sub("", text).splitlines():
        line = _PREFIX.sub("", line).strip()[:_LONGEST]
        if _SECONDARY.search(line):
            continue
        if _KILLED.search(line):
            return f"{line}; the last error before: {error}" if error else line
        if _ERROR.search(line):
            error = line
        elif _LEFT.search(line):
            left = line
    return error or left


def core_end(message: str) -> str | None:
    """Return how vLLM's core processes ended, of a message that names the exit codes of those that failed.

    It names none where one was killed a moment before.
    """
    match = _CORE_STATUSES.search(message)
    pairs = re.findall(r"'([^']*)': (-?\d+)", match[1]) if match else []
    if match and not pairs:
        return _NO_WORD
    return ", ".join(f"{name} {ended(int(status))}" for name, status in pairs) or None


def ended_by_ray(status: int, output: str) -> bool:
    """Say whether Ray itself ended the driver, as its raylet or Ray's head had died.

    It says so in the last line, or no more than that the raylet has ended, and the driver leaves no word of its own.
    """
    last_line = output.rstrip().rpartition("\n")[2]
    has_own_word = last_line.startswith("astar: ") or _ERROR.search(last_line) is not None
    has_lost_raylet = _LOST_RAYLET in output and not has_own_word
    return status == 1 and (has_lost_raylet or _ENDED_BY_RAY.search(last_line) is not None)


def was_killed(cause: str) -> bool:
    """Say whether a cause, as these functions give it, is the end of a process by a signal."""
    return _KILLED.search(cause) is not None


def is_secondary(message: str) -> bool:
    """Say whether an error only points to another one, which stands in the output of the process."""
    return _SECONDARY.search(message) is not None


def cause_in(outputs: Iterable[Path]) -> str | None:
    """Return the last error of `outputs`, read one after the other; files that are not there hold none."""
    texts = []
    for path in outputs:
        with contextlib.suppress(OSError):
            texts.append(tail(path, _TAIL_BYTES).decode(errors="replace"))
    return last_error("\n".join(texts))


def memory_kills(root: Path = Path("/")) -> int:
    """Return how many processes the kernel has killed for memory: on this machine, or in a control group if more."""
    counts = [0]
    folders = group_folders("memory", root)
    counters = (folder / name for folder in folders for name in ("memory.events", "memory.oom_control"))
    for path in (root / "proc/vmstat", *counters):
        counts += [int(number) for number in re.findall(r"^oom_kill (\d+)$", read_text(path), re.MULTILINE)]
    return max(counts)


def low_memory(text: str) -> str | None:
    """Return what to say where Ray ended a process to keep the machine's memory from filling up."""
    match = re.search(r"Memory on the node.*?was\s+(\S+)\s+used\s+/\s+(\S+)\s+limit", text, re.DOTALL)
    if match is None:
        return None
    return f"Ray ended it, as {match[1]} of the machine's {match[2]} of memory were used; close other programs"


def end_of_process(text: str, error: str | None) -> str:
    """Return how a process ended, of what Ray says of that and of the last error in its output.

    That error may be long past where the process was killed.
    """
    if "connection error code 2" in text and not (error and was_killed(error)):
        word = f"; the last error before: {error}" if error else ": it left no word"
        return f"was killed (SIGKILL), or ended itself at once{word}"
    if error:
        return error
    if match := re.search(r"exits with an exit code (\d+)\.( The process receives a SIGTERM)?", text):
        return "was killed by SIGTERM" if match[2] else f"ended with exit status {match[1]}"
    return text.strip().splitlines()[-1]
