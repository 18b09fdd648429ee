"""Memory, cores and kills are read of the process's own control group and of those above it, in both versions."""

import os
from pathlib import Path

import pytest

from astar_megatron.cluster.cgroups import group_folders
from astar_megatron.cluster.cores import available_cores
from astar_megatron.cluster.endings import memory_kills
from astar_megatron.run.resources import GIB, available_memory_bytes

SYSTEM = 8_000_000 * 1024
CORES = float(len(os.sched_getaffinity(0)))
JOB = "sys/fs/cgroup/system.slice/job_7"
UNLIMITED = "9223372036854771712\n"  # as version 1 has it


def machine(root: Path, own: str, files: dict[str, str]) -> Path:
    """Return `root`, which now has 8 GB of memory, a process in the groups `own`, and `files` of control groups."""
    files = {"proc/meminfo": "MemAvailable:    8000000 kB\n", "proc/self/cgroup": own} | files
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, encoding="utf-8")
    return root


@pytest.mark.parametrize("limit", ["memory.max", "memory.high"])
def test_a_jobs_limits_hold_for_the_groups_within_it(tmp_path: Path, limit: str) -> None:
    files = {
        "sys/fs/cgroup/system.slice/memory.max": f"{6 * GIB}\n",
        f"{JOB}/{limit}": f"{4 * GIB}\n",
        f"{JOB}/memory.current": f"{GIB}\n",
        f"{JOB}/memory.events": "low 0\noom_kill 3\n",
        f"{JOB}/cpu.max": "50000 100000\n",
        f"{JOB}/step_0/task_0/memory.max": "max\n",
        f"{JOB}/step_0/task_0/cpu.max": "max 100000\n",
        "sys/fs/cgroup/system.slice/job_8/memory.max": "1\n",  # another's
        "sys/fs/cgroup/system.slice/job_8/cpu.max": "1 100000\n",
    }
    root = machine(tmp_path, "0::/system.slice/job_7/step_0/task_0\n", files)
    assert available_memory_bytes(root) == 3 * GIB
    assert available_cores(root) == 0.5
    assert memory_kills(root) == 3


@pytest.mark.parametrize("cpu", ["cpu", "cpu,cpuacct"])  # the one is a link to the other, where somebody made it
@pytest.mark.parametrize("folder", ["", "/job_7"])
def test_limits_of_version_1_count(tmp_path: Path, folder: str, cpu: str) -> None:
    """In a container the own group is the root of what is seen; in a job it is below that, or the job is above it."""
    files = {
        "sys/fs/cgroup/memory/memory.limit_in_bytes": UNLIMITED,
        f"sys/fs/cgroup/{cpu}/cpu.cfs_quota_us": "-1\n",
        f"sys/fs/cgroup/{cpu}/cpu.cfs_period_us": "100000\n",
    }
    root = machine(tmp_path, "4:memory:/job_7/step_0\n2:cpu,cpuacct:/job_7/step_0\n0::/\n", files)
    assert (available_memory_bytes(root), available_cores(root), memory_kills(root)) == (SYSTEM, CORES, 0)
    files = {
        f"sys/fs/cgroup/memory{folder}/memory.limit_in_bytes": f"{4 * GIB}\n",
        f"sys/fs/cgroup/memory{folder}/memory.usage_in_bytes": f"{3 * GIB}\n",
        f"sys/fs/cgroup/memory{folder}/memory.stat": f"inactive_file 0\ntotal_inactive_file {GIB}\n",
        f"sys/fs/cgroup/memory{folder}/memory.oom_control": "under_oom 0\noom_kill 2\n",
        f"sys/fs/cgroup/{cpu}{folder}/cpu.cfs_quota_us": "50000\n",
        f"sys/fs/cgroup/{cpu}{folder}/cpu.cfs_period_us": "100000\n",
    }
    root = machine(tmp_path, "4:memory:/job_7/step_0\n2:cpu,cpuacct:/job_7/step_0\n0::/\n", files)
    assert (available_memory_bytes(root), available_cores(root), memory_kills(root)) == (2 * GIB, 0.5, 2)


@pytest.mark.parametrize("path", ["/", "/../../job_7"])
def test_in_a_namespace_of_groups_the_root_is_the_own_group_or_all_that_is_seen(tmp_path: Path, path: str) -> None:
    root = machine(tmp_path, f"0::{path}\n", {"sys/fs/cgroup/memory.max": f"{2 * GIB}\n", "job_7/memory.max": "1\n"})
    assert available_memory_bytes(root) == 2 * GIB
    groups = root / "sys/fs/cgroup"
    assert group_folders("memory", root) == [groups, groups / "memory"]


def test_without_control_groups_the_machine_is_the_limit(tmp_path: Path) -> None:
    root = machine(tmp_path, "", {})
    (root / "proc/self/cgroup").unlink()
    assert (available_memory_bytes(root), available_cores(root), memory_kills(root)) == (SYSTEM, CORES, 0)
