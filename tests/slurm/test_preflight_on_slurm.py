"""Preflight of real Ray nodes that slurm/train.sbatch has started: what is wrong with one is named in the job's output.

The program that follows only lists the nodes that Ray has.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from two_node_slurm import Slurm, two_node_slurm

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
# In place of Python: the program `train` is this, all else is real.
PYTHON = f"""#!/bin/sh
if [ "$3" != train ]; then exec {sys.executable} "$@"; fi
exec {sys.executable} -c '
import sys, ray
ray.init(address=sys.argv[1].partition("=")[2], log_to_driver=False)
print("nodes", sorted(node["NodeName"] for node in ray.nodes() if node["Alive"]))' "$7"
"""
RUN = '{"run_dir": "r", "model": {"path": "m"}, "data": {"path": "d"}, "reward": {"name": "last_number"}}'
SMI = '#!/bin/sh\necho "H100, $DRIVER"\n'


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with two_node_slurm(tmp_path_factory.mktemp("slurm")) as slurm:
        yield slurm


@pytest.fixture
def run(slurm: Slurm, tmp_path: Path) -> Callable[..., tuple[str, str, Path]]:
    """Return a function that runs a job under variables: its state, its output, the folder of its logs."""

    def run(**variables: str) -> tuple[str, str, Path]:
        for name, text in (("python", PYTHON), ("nvidia-smi", SMI), ("run.yaml", RUN)):
            (tmp_path / name).write_text(text)
            (tmp_path / name).chmod(0o755)
        (tmp_path / "numbers.py").write_text("raise SystemExit('a file of the user, in place of a module of Python')")
        env = {"ASTAR_PYTHON": str(tmp_path / "python"), "PYTHONPATH": str(ROOT)} | variables
        job = slurm.submit("-N2", ROOT / "slurm" / "train.sbatch", "run.yaml", cwd=tmp_path, env=env)
        state = slurm.wait(job)
        assert slurm.left_behind(job) == []
        return state, (tmp_path / f"{job}.out").read_text(), tmp_path / "logs" / f"slurm-{job}"

    return run


def test_an_unlike_node_is_left_out_where_there_is_a_spare(run: Callable[..., tuple[str, str, Path]]) -> None:
    setup = 'export PATH=$PWD:$PATH DRIVER=570.1; if [ "$SLURMD_NODENAME" = node2 ]; then DRIVER=550.2; fi'
    state, out, logs = run(ASTAR_SETUP=setup, ASTAR_SPARE_NODES="1")
    assert "node2 is bad: GPU driver: 550.2, others 570.1\nleft out: node2\n1 of 2 nodes can be used\n" in out
    assert state == "COMPLETED", out
    assert "nodes ['node1']\n" in (logs / "driver-node1-0.log").read_text()
    measured = json.loads((logs / "preflight-0.json").read_text())
    assert (measured["collective"], measured["left_out"]) == ("gloo", ["node2"])
    assert all(measured["reports"][name]["bandwidth"] > 0 for name in ("node1", "node2"))


def test_a_job_without_spare_nodes_ends_with_the_name_of_the_node_that_is_not_there(
    run: Callable[..., tuple[str, str, Path]],
) -> None:
    state, out, _ = run(ASTAR_SETUP='[ "$SLURMD_NODENAME" = node1 ] || exit 1', ASTAR_START_SECONDS="60")
    assert state == "FAILED"
    assert "node2 is bad: joined: has not joined Ray in time\n" in out
    assert "1 of 2 nodes are bad, node2, and 0 may be left out\n" in out


def test_nodes_are_only_waited_for_without_preflight(run: Callable[..., tuple[str, str, Path]]) -> None:
    state, out, logs = run(ASTAR_PREFLIGHT="0")
    assert state == "COMPLETED", out
    assert "all-reduce" not in out
    assert "2 of 2 nodes can be used\n" in out
    assert "nodes ['node1', 'node2']\n" in (logs / "driver-node1-0.log").read_text()
