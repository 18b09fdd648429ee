"""Waiting says how long it already takes and what for."""

import io
import threading

import pytest
from rich.console import Console

from astar_megatron.run.tracking import Screen


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
