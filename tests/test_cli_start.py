"""What the command line makes sure of before all else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = """
import os, sys
from astar_megatron.cli_start import check_start
check_start()
with open(sys.argv[1], "w") as file:
    file.write(f"{file.fileno() > 2} {sys.stdin.read()!r}")
    print("on stdout"), print("on stderr", file=sys.stderr), os.write(2, b"on 2")
"""


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_file_never_takes_the_place_of_a_closed_stream(closed: str, tmp_path: Path) -> None:
    command = ["bash", "-c", f'"$@" {closed}', "x", sys.executable, "-c", PROGRAM, str(tmp_path / "file")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0
    assert (tmp_path / "file").read_text() == "True ''"


def test_a_current_folder_that_is_gone_is_named(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    command = [
        "bash",
        "-c",
        'rmdir "$PWD" && "$@"',
        "x",
        sys.executable,
        "-P",
        "-m",
        "astar_megatron.cli",
        "data",
        "--help",
    ]
    done = subprocess.run(
        command, cwd=tmp_path / "gone", env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == "astar: the current folder is gone; change to one that is there (cd)\n"
