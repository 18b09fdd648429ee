"""What only a process on a node of the Ray cluster can say of it: `Cluster` calls these functions there.

A node is one machine, or what behaves like one: it has an address on the job's network, folders, logs and process
numbers of its own.
"""

import contextlib
import os
import socket
import time
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import ray
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray._private.worker import global_worker

from astar_megatron.cluster.endings import cause_in
from astar_megatron.cluster.processes import tree
from astar_megatron.cluster.stacks import where

_COHERENT_SECONDS = 15.0  # within which a shared file system shows what another node has written


def address() -> str:
    """Return this node's address on the job's network, as `ray start --node-ip-address` names it or Ray chooses it."""
    return ray.util.get_node_ip_address()


def asks_token() -> bool:
    """Return whether this node's Ray processes answer only those who know the token."""
    return is_token_auth_enabled()


def use_own_interface() -> None:
    """Make gloo in this process meet others on the interface that has the node's address; before a group is made.

    By itself it takes the address that the host's name stands for, often another network's or loopback's. A user's
    GLOO_SOCKET_IFNAME stays.
    """
    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface_of(address()))


def interface_of(own: str) -> str:
    """Return the name of the interface that has the address `own`. Raises ValueError if none has."""
    addresses = {name: [entry.address for entry in entries] for name, entries in psutil.net_if_addrs().items()}
    for name, of_interface in addresses.items():
        if own in of_interface:
            return name
    raise ValueError(
        f"node {own} ({socket.gethostname()}) has no interface with this address, only {addresses}; start Ray with "
        "--node-ip-address set to the address of one, or set GLOO_SOCKET_IFNAME before `ray start`"
    )


def log_folder() -> Path:
    """Return the folder with the output of this node's processes."""
    node = global_worker.node
    assert node is not None
    return Path(node.get_logs_dir_path())


def last_error(pid: int) -> str | None:
    """Return the last error in the output of one of this node's processes; what it logged goes first."""
    return cause_in(_outputs(pid))


def last_words(pids: Mapping[str, int | None]) -> tuple[Path, dict[str, list[str]]]:
    """Return `log_folder`, and by name where some of this node's processes are and their last error, a line each.

    All are asked at once, with those that they have started (stacks.py); who has no process has no word either.
    """

    def words(pid: int | None) -> list[str]:
        return [line for line in (where(tree(pid), _outputs(pid)), last_error(pid)) if line] if pid else []

    with ThreadPoolExecutor(max(1, len(pids))) as pool:
        return log_folder(), dict(zip(pids, pool.map(words, pids.values()), strict=True))


def _outputs(pid: int) -> list[Path]:
    return [path for end in ("out", "err") for path in log_folder().glob(f"worker-*-{pid}.{end}")]


def sizes(folder: str, names: Collection[str]) -> dict[str, int | None]:
    """Return the bytes of files of `folder` as this node sees it; None for one that is not there."""
    paths = {name: Path(folder) / name for name in names}
    return {name: path.stat().st_size if path.is_file() else None for name, path in paths.items()}


def appears(folder: str, mark: str) -> bool:
    """Return whether a file, which another node has named by its text, is seen here with that text, soon."""
    until = time.monotonic() + _COHERENT_SECONDS
    while True:
        with contextlib.suppress(OSError):
            if (Path(folder) / mark).read_text(encoding="utf-8") == mark:
                return True
        if time.monotonic() > until:
            return False
        time.sleep(0.2)


def folder_problem(folder: str, mark: str) -> str | None:
    """Return why this node does not share a folder in which another has made the file `mark`; None if it does."""
    if not appears(folder, mark):
        return "does not see this folder"
    return None if os.access(folder, os.W_OK) else "may not write to it"
