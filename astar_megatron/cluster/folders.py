"""Whether all nodes of the cluster see a folder as the driver does: asked before anything expensive starts."""

import secrets
from pathlib import Path

from astar_megatron.cluster import nodes
from astar_megatron.cluster.cluster import Cluster
from astar_megatron.cluster.errors import ClusterError


def check_read(cluster: Cluster, key: str, folder: str) -> None:
    """Raise ClusterError, naming node and file, where a node has other files in `folder`, of the key `key`.

    By names and sizes: a node may have a copy of its own.
    """
    names = [path.name for path in Path(folder).iterdir() if path.is_file()]
    here = nodes.sizes(folder, names)
    for node, there in cluster.on_each(nodes.sizes, folder, names).items():
        if different := [name for name in names if there[name] != here[name]]:
            name = different[0]
            raise ClusterError(
                f"{key}={folder}: node {cluster.nodes[node].address} sees {_size(there[name])} in place of {name} "
                f"({here[name]} bytes); put the folder where all nodes see it, at the same path, or copy it to each"
            )


def check_written(cluster: Cluster, key: str, folder: str) -> None:
    """Raise ClusterError, naming the node, where a node sees another `folder` than the driver, or can't write to it."""
    if cluster.num_nodes == 1:
        return
    mark = Path(folder) / f".astar-{secrets.token_hex(8)}"
    try:
        mark.write_text(mark.name, encoding="utf-8")
        for node, problem in cluster.on_each(nodes.folder_problem, folder, mark.name).items():
            if problem:
                raise ClusterError(
                    f"{key}={folder}: node {cluster.nodes[node].address} {problem}; choose a folder that all nodes "
                    "share, at the same path"
                )
    finally:
        mark.unlink(missing_ok=True)


def _size(num_bytes: int | None) -> str:
    return "no file" if num_bytes is None else f"{num_bytes} bytes"
