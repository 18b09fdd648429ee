"""Processes of this machine, whatever they are called, and where one is that may end at any moment."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from astar_megatron.cluster import stacks
from astar_megatron.cluster.processes import process_tree, tree

WAITS = "import faulthandler, signal; faulthandler.register(signal.SIGUSR2); print(flush=True); input()"


def test_a_name_that_the_kernel_has_cut_inside_a_letter_hides_no_process(cut_name: None) -> None:
    assert process_tree(os.getpid()) >= tree(os.getpid()).keys() >= {os.getpid()}


def test_a_process_that_ends_while_it_is_asked_where_it_is_is_not_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "worker-1.err"
    command = [sys.executable, "-c", WAITS]
    with output.open("w") as errors, subprocess.Popen(command, stdin=-1, stdout=-1, stderr=errors) as process:
        assert process.stdout is not None
        process.stdout.readline()
        read = stacks._text

        def text(outputs: Sequence[Path]) -> str:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return read(outputs)

        monkeypatch.setattr(stacks, "_text", text)
        assert stacks.where([process.pid], [output]) == ""
