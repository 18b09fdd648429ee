"""The transfer folder: whose run lives keeps it, whose run was killed loses it."""

import subprocess
import sys
from pathlib import Path

from astar_megatron.weights import TransferFolder

HOLD = """
from astar_megatron.weights import TransferFolder
with TransferFolder() as folder:
    print(folder.path, flush=True)
    input()
"""


def test_what_a_killed_run_left_is_removed_and_what_a_living_one_holds_is_not() -> None:
    killed, living = (
        subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    )
    try:
        paths = [Path(process.stdout.readline().strip()) for process in (killed, living) if process.stdout]
        killed.kill()
        killed.wait()
        assert all(path.is_dir() for path in paths)
        with TransferFolder() as folder:
            assert [path.is_dir() for path in (*paths, folder.path)] == [False, True, True]
        assert not folder.path.exists()
    finally:
        living.communicate("\n")
    assert not paths[1].exists()
