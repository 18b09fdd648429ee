"""Whether something answers at `cluster.address`: asked before anything is written, and without Ray."""

import socket

from astar_megatron.cluster.errors import ClusterError
from astar_megatron.config import host_and_port


def knock(address: str) -> None:
    """Raise ClusterError if nothing listens at host:port, ValueError if it is none; Ray would try for minutes."""
    host, _, port = host_and_port(address).rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, UnicodeError) as error:  # the latter: no name that a host can have
        raise unanswered(address, error) from None


def unanswered(address: str, error: Exception) -> ClusterError:
    """Return the error that no Ray cluster answers there."""
    return ClusterError(
        f"cluster.address: no Ray cluster answers at {address!r} ({error}); "
        "start one with `ray start --head`, or leave the key out to start one here. If one runs there, "
        "it wants its token: copy it to ~/.ray/auth_token (RAY_AUTH_MODE=disabled where it has none)"
    )
