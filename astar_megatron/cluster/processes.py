"""The processes of this machine that belong together: which they are, and their end, although one of them hangs."""

import contextlib
import os
import signal
from pathlib import Path

from astar_megatron.cluster.session import process_tree

type Processes = dict[int, str]  # by number, when each began: the kernel gives a number again


def tree(pid: int | None) -> Processes:
    """Return a process and all its descendants; none where there is no such process."""
    if pid is None:
        return {}
    began = {member: _began(member) for member in process_tree(pid)}
    return {member: time for member, time in began.items() if time}


def kill(processes: Processes) -> None:
    """End those that still run, with all that they have started since, by SIGKILL, which a stopped one obeys too."""
    for pid, began in processes.items():
        if _began(pid) == began:
            for member in process_tree(pid):
                with contextlib.suppress(OSError):  # it has just ended
                    os.kill(member, signal.SIGKILL)


def _began(pid: int) -> str | None:
    """When a process began, in the kernel's ticks since its own start."""
    try:
        # pid (name) state ...: a name may hold anything, so what follows its last bracket is read
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None
