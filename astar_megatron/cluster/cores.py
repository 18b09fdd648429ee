"""How many CPU cores this process may use: by its affinity and its control groups, not by the machine."""

import os
import sys
from pathlib import Path

from astar_megatron.cluster.cgroups import group_folders, read_text

_BINDINGS = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")


def available_cores(root: Path = Path("/")) -> float:
    """Return the cores this process may use; a fraction where a control group gives a share of one."""
    cores = float(len(os.sched_getaffinity(0)))
    for folder in group_folders("cpu", root):
        version_1 = [read_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
        for quota, period in (read_text(folder / "cpu.max").split() or ["", ""], version_1):
            if quota.isdigit() and period.isdigit():  # else "max", -1, or no such file: no limit
                cores = min(cores, int(quota) / int(period))
    return cores


def unbind() -> None:
    """Take out of the environment what binds OpenMP's threads to cores, and say so; before torch is imported.

    Else torch binds the thread that imports it to the first core, and whatever that starts inherits it.
    """
    values = {name: os.environ.pop(name, "none") for name in _BINDINGS}
    if names := [name for name, value in values.items() if value.lower() not in ("false", "none", "disabled")]:
        print(f"{', '.join(names)}: left out, as ranks and engines would share one core", file=sys.stderr)
