"""`astar` as a user starts it, ended at a moment, and what it leaves behind on this machine."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sockets import members

from astar_megatron.cluster import session

SHARED_MEMORY = Path("/dev/shm")
GONE_SECONDS = 20.0  # after the driver's death, until nothing of it is left
_LISTENS = "0A"  # a state in /proc/net/tcp


class Driver:
    """A running `astar`, in a session of its own, with a folder of its own for temporary files."""

    def __init__(self, *words: str) -> None:
        self.temporary = Path(tempfile.mkdtemp(prefix="e"))
        self._output = self.temporary.with_suffix(".txt")
        self._shared = shared_memory()
        self._pids: set[int] = set()  # of all that has been seen of it
        self._ports: set[str] = set()
        with self._output.open("w") as output:
            self.process: subprocess.Popen[str] = subprocess.Popen(
                # nohup and a shell's `&` ignore Ctrl-C, and so would what they start
                ["env", "--default-signal=INT", sys.executable, "-m", "astar_megatron.cli", *words],
                cwd=Path(__file__).parent,  # where the reward is
                env=os.environ | {"TMPDIR": str(self.temporary), "COLUMNS": "200"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )

    def output(self) -> str:
        return self._output.read_text()

    def wait_for(self, moment: Callable[[str], bool]) -> None:
        """Wait until `moment` says so of the output."""
        while not moment(self.output()):
            assert self.process.poll() is None, f"ended before: {self.output()}"
            time.sleep(0.01)

    def end(self, *signals: signal.Signals, group: bool = False, seconds_between: float = 1.5) -> int:
        """Send signals one after the other, to all of the process group if asked; return the exit status.

        Asserts that GONE_SECONDS later no process, port, shared memory or temporary file is left but logs.
        """
        self.look()
        for index, number in enumerate(signals):
            if index:
                time.sleep(seconds_between)
            (os.killpg if group else os.kill)(self.process.pid, number)
            self._pids |= members(self.process.pid)
        return self.wait()

    def look(self) -> set[int]:
        """Return the processes that it has now, and remember them and their ports for `wait`."""
        pids = members(self.process.pid)
        self._pids |= pids
        self._ports |= ports_of(pids)
        return pids

    def wait(self) -> int:
        """Return its exit status when it has ended, and assert what `end` does of all that was seen of it."""
        status = self.process.wait()
        until = time.monotonic() + GONE_SECONDS
        while (left := self._left()) and time.monotonic() < until:
            time.sleep(0.1)
        assert not left, (left, self.output())
        return status

    def _left(self) -> list[str]:
        logs = {path for folder in self.temporary.glob("astar-*/r/session_*/logs") for path in folder.rglob("*")}
        above = {parent for path in logs for parent in path.parents}
        for pattern in ("astar-*", "astar-*/lock", "astar-*/r", "astar-*/r/session_*", "astar-*/r/session_*/logs"):
            above |= set(self.temporary.glob(pattern))
        above |= set(self.temporary.glob("torchinductor_*"))  # a cache of torch's, which it keeps for the next process
        living = {int(path.name) for path in Path("/proc").glob("[0-9]*")}
        shared = shared_memory() - self._shared - set(session.shared_files_of(living))  # a living run's are its own
        return [
            *(f"process {pid}: {name_of(pid)}" for pid in self._pids if is_alive(pid)),
            *(f"port {port}" for port in self._ports & listening()),
            *(f"{SHARED_MEMORY}/{name}" for name in shared if not is_locked(SHARED_MEMORY / name)),
            *(str(path) for path in self.temporary.rglob("*") if path not in logs | above),
        ]

    def driver(self) -> int:
        """Its process number."""
        return self.process.pid

    def child(self) -> int:
        """The process that this one watches over."""
        return int(Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()[0])

    def remove(self) -> None:
        if self.process.poll() is None:
            self.end(signal.SIGKILL)
        shutil.rmtree(self.temporary)
        self._output.unlink()


@contextmanager
def driver(*words: str) -> Iterator[Driver]:
    process = Driver(*words)
    try:
        yield process
    finally:
        process.remove()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def shared_memory() -> set[str]:
    return {path.name for path in SHARED_MEMORY.iterdir()}


def is_locked(folder: Path) -> bool:
    """Whether a folder is a living run's."""
    try:
        inode = (folder / "lock").stat().st_ino
    except OSError:
        return False
    return any(f":{inode} " in line for line in Path("/proc/locks").read_text().splitlines())


def listening() -> set[str]:
    """The ports of this machine on which something listens, with the inodes of their sockets."""
    lines = [line for table in ("tcp", "tcp6") for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]]
    return {f"{line.split()[1]} {line.split()[9]}" for line in lines if line.split()[3] == _LISTENS}


def ports_of(pids: set[int]) -> set[str]:
    """Those of `listening` that processes have."""
    inodes = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                inodes.add(str(descriptor.readlink()))
            except OSError:
                continue
    return {port for port in listening() if f"socket:[{port.split()[1]}]" in inodes}
