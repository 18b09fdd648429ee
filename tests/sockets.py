"""Where the processes of a run listen, as the kernel lists it."""

from contextlib import suppress
from pathlib import Path

LISTENS = "0A"  # a state in /proc/net/tcp
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def members(session: int) -> set[int]:
    """The processes of a session of the kernel's, with all that they started, also in sessions of their own."""
    parents, pids = {}, set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(folder.name)] = int(fields[1])
        if int(fields[3]) == session:
            pids.add(int(folder.name))
    while more := {pid for pid, parent in parents.items() if parent in pids} - pids:
        pids |= more
    return pids


def listening(pids: set[int]) -> dict[str, int]:
    """The local addresses (hexadecimal, without the port) on which these processes listen, and how often."""
    inodes = set()
    for pid in pids:
        with suppress(OSError):  # the process has ended
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(FileNotFoundError):
                    inodes.add(str(descriptor.readlink()))
    counts: dict[str, int] = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENS and f"socket:[{fields[9]}]" in inodes:
                address = fields[1].partition(":")[0]
                counts[address] = counts.get(address, 0) + 1
    return counts
