"""How many CPU cores this process may use: by its affinity and its control group, not by the machine."""

import os
from pathlib import Path


def available_cores(root: Path = Path("/")) -> float:
    """Return the cores this process may use; a fraction where a control group gives a share of one."""
    cores = float(len(os.sched_getaffinity(0)))
    try:
        text = (root / "sys/fs/cgroup/cpu.max").read_text(encoding="utf-8")
    except OSError:
        return cores
    quota, _, period = text.strip().partition(" ")
    return min(cores, int(quota) / int(period)) if quota.isdigit() and period.isdigit() else cores
