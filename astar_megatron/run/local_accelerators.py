"""The accelerators of this machine, told by a process that ends: one that asks may keep a context on each of them.

That is memory which no share counts, and of a GPU that takes one process alone (EXCLUSIVE_PROCESS) it is all.
"""

import json
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

_TELL = """
import json, torch
device = torch.get_device_module()
told = [device.get_device_properties(index) for index in range(torch.accelerator.device_count())]
print(json.dumps([[gpu.name, gpu.total_memory, getattr(gpu, "major", 0), getattr(gpu, "minor", 0)] for gpu in told]))
"""


class Accelerator(NamedTuple):
    """One accelerator; its compute capability is 0 where it is no GPU of NVIDIA's."""

    name: str
    total_bytes: int
    capability: float


@cache
def local_accelerators() -> tuple[Accelerator, ...] | None:
    """Return those that torch sees; None where torch is not installed.

    Raises ValueError where torch sees some and can't ask them.
    """
    if find_spec("torch") is None:
        return None
    import torch

    return told_by(_TELL) if torch.accelerator.is_available() else ()


def told_by(program: str) -> tuple[Accelerator, ...]:
    """Return what a Python program prints of accelerators."""
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"the process ended with status {done.returncode}"]
        raise ValueError(f"torch can't use the accelerators of this machine: {lines[-1]}; see nvidia-smi")
    told = json.loads(done.stdout.splitlines()[-1])
    return tuple(Accelerator(name, total, major + minor / 10) for name, total, major, minor in told)
