"""What keeps Ray from starting on this machine: looked for before it is started, and in its logs when it was not."""

import socket
from pathlib import Path

from astar_megatron.cluster.endings import cause_in
from astar_megatron.cluster.errors import ClusterError

_SECONDS = 5.0


def check_loopback(address: str) -> None:
    """Raise ClusterError where a loopback address reaches nobody: Ray would try for minutes."""
    try:
        with socket.create_server((address, 0)) as server:
            socket.create_connection(server.getsockname(), timeout=_SECONDS).close()
    except OSError as error:
        raise ClusterError(
            f"Ray can't be started: {address} does not answer itself ({error}); bring the loopback device up: "
            "ip link set lo up"
        ) from None


def unstarted(folder: Path, error: Exception) -> ClusterError:
    """Return the error that Ray did not start with its files in a folder, with the last error of its processes."""
    logs = sorted(folder.glob("session_[0-9]*/logs/*"), key=lambda path: path.name != "raylet.out")  # the raylet's last
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    cause = cause_in(path for path in reversed(logs) if path.is_file())
    last = f"; the last error of its processes: {cause}" if cause and cause not in reason else ""
    return ClusterError(f"Ray did not start on this machine: {reason}{last}; its logs: {folder}")
