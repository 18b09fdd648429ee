"""What keeps Ray from starting on this machine (a Ray of its own, or none)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
START = """
from astar_megatron.cluster.cluster import Cluster
from astar_megatron.config import ClusterConfig
with Cluster(ClusterConfig()) as cluster:
    print("nodes", cluster.num_nodes)
"""


def started(*before: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*before, sys.executable, "-c", START],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | variables,
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_what_other_uses_of_ray_and_python_set_keeps_none_from_starting(tmp_path: Path) -> None:
    """Also below `uv run`, by which Ray would pack the whole file system."""
    (tmp_path / "uv").symlink_to(shutil.which("bash") or "")
    (tmp_path / "run").write_text('"$@"\nexit $?\n')
    others = {"RAY_RUNTIME_ENV_HOOK": "no.such", "RAY_LOG_TO_STDERR": "1", "PYTHONWARNINGS": "error"}
    done = started(str(tmp_path / "uv"), "run", cwd=tmp_path, **others)
    assert (done.returncode, done.stdout) == (0, "nodes 1\n"), done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes a network of its own")
def test_a_loopback_device_that_is_down_is_named() -> None:
    done = started("unshare", "-n")
    assert done.returncode and "ip link set lo up" in done.stderr


@pytest.mark.slow
def test_a_ray_that_does_not_start_is_told_in_a_line_with_the_last_error_of_its_processes() -> None:
    done = started("bash", "-c", 'ulimit -f 100000 && exec "$@"', "x")  # less than Ray's object store takes
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "ClusterError: Ray did not start on this machine" in last and "its logs: " in last
