"""What the environment says of OpenMP's threads binds no program, nor what it starts, to one core."""

import os
import subprocess
import sys

import pytest

CORES = len(os.sched_getaffinity(0))

BOUND = """
import contextlib, os, sys
sys.argv = ["astar", "--help"]
from astar_megatron.cli import main
with contextlib.suppress(SystemExit):
    main()
import torch
sys.exit(len(os.sched_getaffinity(0)))
"""


@pytest.mark.skipif(CORES == 1, reason="on one core nothing shows that a process is bound to it")
@pytest.mark.parametrize("setting", ["OMP_PROC_BIND=true", "OMP_PLACES=cores", "GOMP_CPU_AFFINITY=0"])
def test_a_program_is_not_bound_to_a_core_by_the_environment(setting: str) -> None:
    name, _, value = setting.partition("=")
    done = subprocess.run(
        [sys.executable, "-c", BOUND], env=os.environ | {name: value}, capture_output=True, text=True, check=False
    )
    assert done.returncode == CORES, done.stderr
    assert done.stderr == f"{name}: left out, as ranks and engines would share one core\n"
