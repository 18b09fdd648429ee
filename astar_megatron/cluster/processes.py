"""The processes of this machine that belong together: which they are, and their end, although one of them hangs."""

import contextlib
import ctypes
import json
import os
import signal
import sys
from collections.abc import Iterable
from pathlib import Path

type Processes = dict[int, str]  # by number, when each began: the kernel gives a number again

_PARENT, _BEGAN = 1, 19  # of the words of `_facts`; when, in ticks since the kernel's own start
_PR_SET_PDEATHSIG = 1


def python(code: str, *arguments: str) -> list[str]:
    """Return the command that runs code of ours, with this process's modules and the arguments in sys.argv[1:]."""
    begin = "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); "
    return [sys.executable, "-P", "-c", begin + code, json.dumps(module_path()), *arguments]


def module_path() -> list[str]:
    """Return the Python path for a program of ours: the current folder last.

    So a numbers.py there takes no module's place, wherever the folder stands here, and a reward is found: rewards.get.
    Only where this package itself lies there all stays as it is, so that both run the same copy.
    """
    here, own = str(Path.cwd()), str(Path(__file__).parents[2])
    if here == own:
        return [place or here for place in sys.path]
    return [*(place for place in sys.path if place not in ("", here)), here]


def process_tree(pid: int) -> set[int]:
    """Return a process and all its descendants."""
    parents, members = {}, {pid}
    for folder in Path("/proc").glob("[0-9]*"):
        if facts := _facts(int(folder.name)):
            parents[int(folder.name)] = int(facts[_PARENT])
    while more := {child for child, parent in parents.items() if parent in members} - members:
        members |= more
    return members


def tree(*pids: int) -> Processes:
    """Return processes and all their descendants, with when each began; none where there is no such process."""
    members = {member for pid in pids for member in process_tree(pid)}
    return {member: facts[_BEGAN] for member in members if (facts := _facts(member))}


def kill(processes: Processes) -> None:
    """End those that still run, with all that they have started since, by SIGKILL, which a stopped one obeys too.

    But trackers, which end by themselves then.
    """
    for pid, began in processes.items():
        if (facts := _facts(pid)) and facts[_BEGAN] == began:
            members = process_tree(pid)
            for member in members - trackers(members):
                with contextlib.suppress(OSError):  # it has just ended
                    os.kill(member, signal.SIGKILL)


def trackers(pids: Iterable[int]) -> set[int]:
    """Those that remove what others leave in /dev/shm, as multiprocessing has them: they end when those have ended."""
    names = {}
    for pid in pids:
        with contextlib.suppress(OSError):  # it has just ended
            names[pid] = Path(f"/proc/{pid}/cmdline").read_bytes()
    return {pid for pid, name in names.items() if b"multiprocessing.resource_tracker" in name}


def die_with(parent: int, number: signal.Signals) -> None:
    """Ask the kernel for a signal to this process when `parent` ends, however; end at once where it has."""
    ask_kernel(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        sys.exit(1)


def ask_kernel(option: int, value: int) -> None:
    """Call prctl(2), which only Linux has."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(option, value)


def _facts(pid: int) -> list[str]:
    """The words of /proc/<pid>/stat behind the name, which may be any bytes; none where the process has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []
