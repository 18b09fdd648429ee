"""Whether a run suits the nodes of a job; the commands of the guides are jobs that their configurations suit."""

import itertools
import re
import shlex
from pathlib import Path

import pytest
from samples import run_config

from astar_megatron.cluster.demands import check_job
from astar_megatron.cluster.placement import Node, PlacementError
from astar_megatron.config import load

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = [
    (page.name, line)
    for page in sorted([*ROOT.glob("*/README.md"), ROOT / "README.md", *ROOT.glob("astar_megatron/*/README.md")])
    for line in re.findall(r"^(?:.*[ (])?sbatch .*configs/.*$", page.read_text(encoding="utf-8"), re.MULTILINE)
    if "slurm/" in line
]


def nodes(count: int, gpus: int) -> list[Node]:
    return [Node(address=f"node{number}", num_gpus=gpus) for number in range(count)]


def test_gpus_must_be_there_where_a_key_asks_for_them() -> None:
    cfg = run_config(cluster={"share_gpus": True})
    with pytest.raises(
        PlacementError, match=r"cluster\.share_gpus=true is for GPUs, but the job has none; ask for them"
    ):
        check_job(cfg, "train", nodes(1, 0), 0)
    check_job(cfg, "train", nodes(1, 1), 0)
    check_job(cfg, "export", nodes(1, 0), 0)
    check_job(run_config(), "train", nodes(1, 0), 0)


def test_nodes_without_work_are_refused_unless_they_are_spare() -> None:
    cfg = run_config(parallel={"data": 2}, rollout={"num_engines": 2})
    check_job(cfg, "train", nodes(2, 2), 0)
    with pytest.raises(PlacementError, match=r"2 nodes of the job, of which 1 would have nothing to do: .*; ask for 1"):
        check_job(cfg, "sweep", nodes(2, 2), 0)
    check_job(cfg, "sweep", nodes(2, 2), 1)
    with pytest.raises(PlacementError, match=r"at least 2 shared.*there are 1"):
        check_job(cfg, "train", nodes(1, 1), 0)
    with pytest.raises(PlacementError, match=r"what fits: more GPUs, or smaller parallel and rollout$"):
        check_job(run_config(parallel={"data": 4}), "train", nodes(2, 1), 0)


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_every_sbatch_command_of_the_guides_suits_its_configuration(page: str, line: str) -> None:
    words = shlex.split(re.sub(r"^\w+=\$\((.*)\)$", r"\1", line), comments=True)
    before, after = words[: words.index("sbatch")], words[words.index("sbatch") + 1 :]
    (config,) = (number for number, word in enumerate(after) if word.startswith("configs/"))
    flags = dict(word.split("=", 1) for word in after[: config - 1] if word.startswith("--") and "=" in word)
    count = int(after[after.index("-N") + 1]) if "-N" in after else 1
    program = "sweep" if after[config - 1].endswith("sweep.sbatch") else "train"
    program = next((word.partition("=")[2] for word in before if word.startswith("ASTAR_PROGRAM=")), program)
    sets = [word for option, word in itertools.pairwise(after) if option == "--set"]
    check_job(load(ROOT / after[config], sets), program, nodes(count, int(flags.get("--gpus-per-node", 0))), 0)


def test_no_job_of_the_guides_waits_for_ever_or_for_every_task_of_an_array() -> None:
    waiting = [line for _, line in COMMANDS if "--dependency" in line]
    assert len(waiting) == 2
    for line in waiting:
        assert "--dependency=afterany:$sweep " in line or "--kill-on-invalid-dep=yes " in line, line


def test_the_guides_have_such_commands() -> None:
    assert len(COMMANDS) >= 6
