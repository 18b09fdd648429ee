"""Folders that all nodes must share: one that a node sees late is shared, one that it may not write to is named."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from threading import Timer
from typing import Any, ClassVar

import pytest

from astar_megatron.cluster.errors import ClusterError
from astar_megatron.cluster.folders import check_written
from astar_megatron.cluster.placement import Node


class FarNode:
    """A cluster of two nodes, of which one has a copy of the folder that gets its files a little later."""

    num_nodes = 2
    nodes: ClassVar = {"far": Node(address="10.0.0.2", num_gpus=0, id="far")}

    def __init__(self, copy: Path) -> None:
        self._copy = copy

    def on_each(self, function: Callable[..., Any], folder: str, *arguments: Any) -> dict[str, Any]:
        later = Timer(0.5, shutil.copytree, (folder, self._copy))
        later.start()
        answer = function(str(self._copy), *arguments)
        later.join()
        return {"far": answer}


def test_a_file_that_a_node_sees_late_shows_that_the_folder_is_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    cluster: Any = FarNode(tmp_path / "far")
    check_written(cluster, "run_dir", str(tmp_path / "run"))
    assert list((tmp_path / "run").iterdir()) == []
    cluster = FarNode(tmp_path / "other")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ClusterError, match=r"run_dir=.*run: node 10\.0\.0\.2 may not write to it"):
        check_written(cluster, "run_dir", str(tmp_path / "run"))
