"""What is said and written of a run: how long waiting takes and what for, and what there is no place for."""

import io
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from astar_megatron.data.files import StorageError
from astar_megatron.run.tracking import Screen, Tracker


def test_a_long_wait_says_meanwhile_what_goes_on() -> None:
    text, asked = io.StringIO(), threading.Event()
    phases = iter(["loading weights", "capturing graphs"])

    def phase() -> str:
        words = next(phases, "")
        if not words:
            asked.set()
        return words

    with Screen(Console(file=text, width=200)).waiting("starting the engines", phase, seconds_a_line=0.05):
        assert asked.wait(30)
    lines = text.getvalue().splitlines()
    assert lines[:2] == ["starting the engines: 0 s; loading weights", "starting the engines: 0 s; capturing graphs"]
    assert lines[-1].startswith("starting the engines: 0.") and lines[-1].endswith(" s")


@pytest.mark.parametrize("terminal", [True, False])
def test_a_short_wait_leaves_one_line_and_a_failed_one_none(terminal: bool) -> None:
    text = io.StringIO()
    screen = Screen(Console(file=text, force_terminal=terminal, width=200, color_system=None))
    with screen.waiting("starting the policy"):
        pass
    assert text.getvalue().count(" s\n") == 1
    with pytest.raises(ValueError, match="broken"), screen.waiting("again"):
        raise ValueError("broken")
    assert "again: " not in text.getvalue()
    assert threading.active_count() == 1 or not any("watch" in thread.name for thread in threading.enumerate())


TALKS = """
import sys
from astar_megatron.run.tracking import Screen
screen = Screen()
sys.stdin.readline()
for _ in range(3):
    screen.say("x" * 100_000)
with screen.progress("rows", 4) as advance:
    advance(4)
print("nobody hears this", flush=True)
sys.exit(3)
"""


@pytest.mark.parametrize("output", ["a pipe that nobody reads", "/dev/full"])
def test_a_program_goes_on_where_what_it_says_has_no_place(output: str) -> None:
    command = [sys.executable, "-c", TALKS]
    stdout: Any = subprocess.PIPE
    if output.startswith("/"):
        stdout = os.open(output, os.O_WRONLY)
        command[2] = command[2].replace('print("nobody hears this", flush=True)', "")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=stdout, stderr=subprocess.PIPE) as process:
        if process.stdout is not None:
            process.stdout.close()
        _, error = process.communicate(b"\n", timeout=60)
    assert (process.returncode, error) == (3, b"")


def test_a_line_of_metrics_that_has_no_place_is_said_with_path_and_remedy(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    tracker.metrics_path.mkdir()
    with pytest.raises(
        StorageError, match=r"metrics\.jsonl: can't write a line: Is a directory; choose another folder"
    ):
        tracker.log({"step": 0})
