"""How a process ended, in one line: by its exit status, by what it wrote last, and by what the kernel counts.

Ray says of most ends only that a connection broke, and vLLM that its core failed; what happened stands in the output
of the process.
"""

import re
import signal
from collections.abc import Iterable
from pathlib import Path

_LONGEST = 1000  # characters of a cause
_TAIL_BYTES = 256 << 10  # of an output that is read: a traceback of every worker fits
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
# What vLLM's logger puts before each line of a traceback: (EngineCore pid=7) ERROR 11-28 00:24:04 [core.py:1510]
_PREFIX = re.compile(r"^(?:\([^()]* pid=\d+\) )?(?:ERROR|CRITICAL|WARNING) [\d-]+ [\d:]+ \[[^\]]*\] ")
_CAUSES = (
    re.compile(r"^(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Exit|Expired|Refused)\b(?::.*)?$"),
    re.compile(r"^\*{3} SIG[A-Z]+ received"),  # written by the handler that Ray installs
    re.compile(r"^Fatal Python error: "),
    re.compile(r"^terminate called "),
    re.compile(r"died unexpectedly \(exit code: "),
    re.compile(r"^[\w ]+ (?:ended with exit status [1-9]|was killed by )"),  # as `ended` says it
)
# Errors that only point to another, or that follow from it.
_SECONDARY = re.compile(
    r"root cause|stack trace|background process|EngineDeadError|CancelledError|BrokenPipeError|ConnectionResetError"
    r"|ContextTerminated|Engine core initialization failed|ActorDiedError|KeyboardInterrupt|SystemExit"
)
_CORE_STATUSES = re.compile(r"Failed core proc\(s\): \{([^}]*)\}")


def ended(status: int) -> str:
    """Return in words how a process ended, from its return code as `subprocess` and `multiprocessing` give it."""
    if status >= 0:
        return f"ended with exit status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    return f"was killed by {name}" + (" (so ends the kernel a process for memory)" if -status == signal.SIGKILL else "")


def last_error(text: str) -> str | None:
    """Return the last error in the output of a process and its children, without what only points to another."""
    found = None
    for line in _COLOURS.sub("", text).splitlines():
        line = _PREFIX.sub("", line)
        if any(pattern.search(line) for pattern in _CAUSES) and not _SECONDARY.search(line):
            found = line.strip()[:_LONGEST]
    return found


def core_end(message: str) -> str | None:
    """Return how vLLM's core processes ended, of a message that names the exit codes of those that failed."""
    match = _CORE_STATUSES.search(message)
    pairs = re.findall(r"'([^']*)': (-?\d+)", match[1]) if match else []
    return ", ".join(f"{name} {ended(int(status))}" for name, status in pairs) or None


def is_secondary(message: str) -> bool:
    """Say whether an error only points to another one, which stands in the output of the process."""
    return _SECONDARY.search(message) is not None


def cause_in(outputs: Iterable[Path]) -> str | None:
    """Return the last error of the first of `outputs` that holds one; files that are not there hold none."""
    for path in outputs:
        try:
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
                text = file.read().decode(errors="replace")
        except OSError:
            continue
        if cause := last_error(text):
            return cause
    return None


def memory_kills(root: Path = Path("/")) -> int:
    """Return how many processes the kernel has killed for memory: on this machine, or in this control group if more."""
    counts = [0]
    for path in ("proc/vmstat", "sys/fs/cgroup/memory.events", "sys/fs/cgroup/memory/memory.oom_control"):
        try:
            text = (root / path).read_text(encoding="utf-8")
        except OSError:
            continue
        counts += [int(number) for number in re.findall(r"^oom_kill (\d+)$", text, re.MULTILINE)]
    return max(counts)
