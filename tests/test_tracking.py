"""What is said and written of a run: how long waiting takes and what for, and what there is no place for."""

import io
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from astar_megatron.data.files import StorageError
from astar_megatron.doctor import show
from astar_megatron.run.board import board_on
from astar_megatron.run.machine import Finding
from astar_megatron.run.tracking import Clock, Screen, Tracker, greedy_scores, read_metrics
from astar_megatron.types import Span


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


@pytest.mark.parametrize("terminal", [True, False])
def test_square_brackets_of_a_users_names_are_shown_as_they_are(terminal: bool) -> None:
    text, name = io.StringIO(), "runs/[v2]/[/a]/[bold]x"
    console = Console(file=text, force_terminal=terminal, width=400, color_system=None)
    screen = Screen(console)
    screen.say(name)
    screen.table(f"evaluation of {name}", [(f"name {name}", f"value {name}")])
    with screen.progress(f"rows of {name}", 1) as advance:
        advance(1)
    show([Finding(f"subject {name}", "ok", name, name)], console)
    for label in ("", "evaluation of ", "name ", "value ", "rows of ", "subject "):
        assert label + name in text.getvalue()


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


@pytest.mark.parametrize("terminal", [True, False])
def test_control_characters_of_a_models_text_do_not_reach_the_terminal(terminal: bool) -> None:
    text, answer = io.StringIO(), "\x1b]0;title\x07a\rb\x9b2J\tc"
    screen = Screen(Console(file=text, force_terminal=terminal, width=200, color_system=None))
    screen.say(answer)
    screen.table("responses", [("the longest", answer)])
    assert text.getvalue().count("\\x1b]0;title\\x07a\\x0db\\x9b2J") == 2
    assert not set(text.getvalue()) & set("\x07\r\x1b\x9b")


WARNS = """
import logging, sys
from astar_megatron import cli
sys.argv = ["astar", "--help"]
try:
    cli.main()
finally:
    logging.getLogger("reward").warning("can't read \\x1b[2J of s3://me:S3cret@hub/x")
"""


def test_a_warning_that_quotes_a_response_is_shown_as_all_else_is() -> None:
    done = subprocess.run([sys.executable, "-c", WARNS], capture_output=True, text=True, check=True)
    assert done.stderr == "can't read \\x1b[2J of s3://<login>@hub/x\n"


def run_on(console: Console) -> None:
    """Two steps of a run on a board, with an evaluation between them; then one that is waited for."""
    screen = Screen(console)
    with board_on(console, 4) as board:
        for step in range(2):
            board.now("generate")
            screen.say(f"words of step {step}")
            with screen.progress("evaluation", 2) as advance:
                advance(2)
            board.now("")
            board.add({"step": step, "reward_mean": 0.25 + step, "slope": 0.5, "seconds": {"generate": 7.5}})
        board.now("score")


def test_a_terminal_has_a_table_of_the_newest_steps_below_what_is_said() -> None:
    text = io.StringIO()
    run_on(Console(file=text, force_terminal=True, width=100, color_system=None))
    plain = re.sub(r"\x1b\[[?\d;]*[A-Za-z]|\r", "\n", text.getvalue())  # moves of the cursor begin another line
    lines = [line for line in plain.splitlines() if line.strip()]
    header, first, second, last = lines[-4:]
    seconds = ["generate", "publish", "reference", "policy", "total"]
    assert re.sub(r" s\b", "", header).split() == ["step", "reward", "slope", *seconds]
    assert (first.split(), second.split()) == (["0", "0.250", "0.500", "7.5"], ["1", "1.250", "0.500", "7.5"])
    assert re.fullmatch(r"step 2 of 0\.\.3  waiting for the reward, \d+ s", last)
    assert [line for line in lines if "words of step" in line] == ["words of step 0", "words of step 1"]
    assert any(line.startswith("evaluation") and "2/2" in line for line in lines)


def test_where_there_is_no_terminal_a_board_says_nothing() -> None:
    text = io.StringIO()
    run_on(Console(file=text, width=100))
    lines = [re.sub(r"[\d.]+ s", "0 s", line) for line in text.getvalue().splitlines()]
    assert lines == ["words of step 0", "evaluation: 2 in 0 s", "words of step 1", "evaluation: 2 in 0 s"]


def test_seconds_and_timeline_of_a_step_are_the_same_spans() -> None:
    names: list[str] = []
    clock = Clock(names.append)
    with clock.span("publish", "ranks", "engines"):
        pass
    with clock.span("train"):
        clock.note_ended([Span(name="reference", who="ranks", start=7.0, end=7.5)])
    clock.note("checkpoint", "driver", [(clock._start - 2.0, clock._start - 1.5)])
    seconds, spans = clock.stop(), clock.spans
    assert names == ["publish", "", "train", ""]
    assert set(seconds) == {"publish", "train", "checkpoint", "total"} and seconds["checkpoint"] == pytest.approx(0.5)
    assert seconds["train"] == sum(span.end - span.start for span in spans if span.name == "train")
    assert [span.who for span in spans if span.name == "publish"] == ["driver", "ranks", "engines"]
    (reference,) = [span for span in spans if span.name == "reference"]
    (train,) = [span for span in spans if span.name == "train"]
    assert reference.end - reference.start == pytest.approx(0.5) and reference.end <= train.end
    (timeline,) = clock.timeline().values()
    assert isinstance(timeline, list) and timeline[0] == ("checkpoint", "driver", -2.0, -1.5)
    assert len(timeline) == len(spans)


def test_a_line_of_metrics_that_has_no_place_is_said_with_path_and_remedy(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    tracker.metrics_path.mkdir()
    with pytest.raises(
        StorageError, match=r"metrics\.jsonl: can't write a line: Is a directory; choose another folder"
    ):
        tracker.log({"step": 0})


def test_what_a_step_lacks_is_no_number_of_its_metrics(tmp_path: Path) -> None:
    lines = [
        '{"step": 0, "eval": null, "seconds": null, "timeline": null, "reward_mean": null}',
        '{"step": 1, "eval": {"a": {}, "b": null, "c": {"greedy": NaN}, "d": {"greedy": 0.5}}, "loss": 1e999}',
        '{"step": 2, "peak_memory_bytes": [1, 2], "timeline": []}',
        '{"step": 3, "eva',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    first, second, _ = read_metrics(tmp_path)
    assert (greedy_scores(first), greedy_scores(second)) == ({}, {"d": 0.5})
    assert second["eval"]["c"] == {"greedy": None} and second["loss"] is None


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"step": 1, "eval": 5}', ", eval: .* got 5"),
        ('{"step": 1, "eval": {"a": 0.5}}', ", eval: .* got 0.5"),
        ('{"step": 1, "eval": {"a": {"greedy": "high"}}}', ", eval: .* got 'high'"),
        ('{"step": 1, "seconds": [1]}', r", seconds: .* got \[1\]"),
        ('{"step": 1, "seconds": {"total": "1"}}', ", seconds: .* got '1'"),
        ('{"step": 1, "timeline": [["train", "driver", 1]]}', ", timeline: "),
        ('{"step": 1, "reward_mean": "high"}', ", reward_mean: .* got 'high'"),
        ('{"step": 1, "loss": {"a": 1}}', ", loss: "),
        ('{"reward_mean": 1}', ", step: "),
        ("[]", ": expected"),
    ],
)
def test_metrics_that_no_run_writes_are_refused_with_file_line_and_key(line: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n' + line)
    with pytest.raises(ValueError, match=rf"metrics\.jsonl, line 2{words}.*; repair or remove the file"):
        read_metrics(tmp_path)
