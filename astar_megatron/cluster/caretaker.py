"""The process that outlives a driver which was killed, and ends what that had started: session.py's `care`, by itself.

It waits for the end of its input, which the driver holds open and says nothing on. It keeps the driver's output open
until it is done: who reads that to its end knows that nothing is left.
"""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

from astar_megatron.cluster.processes import python, trackers

_PROGRAM = "import pathlib; from astar_megatron.cluster import session; session.care(pathlib.Path(sys.argv[1]))"
_SIGNALS = {signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}  # of which those of a run are the driver's
_END_SECONDS = 20.0  # a killed process may still have gigabytes to give back
_TRACKER_SECONDS = 10.0  # of these, for a tracker on a busy machine


def start(folder: Path) -> subprocess.Popen[bytes]:
    """Start the process that cares for a session's folder once its input has ended."""
    command = python(_PROGRAM, str(folder))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        return subprocess.Popen(command, stdin=subprocess.PIPE, process_group=0)  # with them blocked from its beginning
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def writers(folder: Path) -> set[int]:
    """Return this user's processes, but this one, that have a file below `folder` open to write to it.

    Those that Ray starts log there, and what they start has their output: so they are known when their parents are
    gone, and whatever they call themselves.
    """
    pids, folder = set(), folder.resolve()  # as the kernel names files: a TMPDIR may be a link
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # another user's, or it has just ended
            for descriptor in (process / "fd").iterdir():
                if descriptor.lstat().st_mode & 0o200 and descriptor.readlink().is_relative_to(folder):
                    pids.add(int(process.name))
    return pids - {os.getpid()}


def end_writers(folder: Path) -> None:
    """Kill what `writers` names, and wait until they have given back what they had.

    Trackers, which remove what the others leave in /dev/shm, get the time for it.
    """
    begun = time.monotonic()
    while (pids := writers(folder)) and (seconds := time.monotonic() - begun) < _END_SECONDS:
        for pid in pids - trackers(pids) if seconds < _TRACKER_SECONDS else pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
