"""How a program ends on SIGTERM and SIGUSR1: at once, or where a step is saved; a second signal ends it in any case."""

import os
import signal
import subprocess
import sys
import time

import pytest

from astar_megatron.cluster.signals import RESUME

# Steps that take 1 s and say how they end; a step is saved when a signal has come, as in train.py. Arguments: seconds
# of grace, whether the third step hangs, what it raises then.
STEPS = """
import sys, time
from astar_megatron.cluster import signals
from astar_megatron.cluster.errors import ClusterError
signals.heed()
grace = float(sys.argv[1]) or None
try:
    with signals.StepEnds(grace) as ends:
        for step in ends.steps(range(4)):
            print("step", step, flush=True)
            time.sleep(30 if step == 2 and "hangs" in sys.argv else 1)
            if step == 2 and "fails" in sys.argv:
                raise ClusterError("policy: step: policy rank 0: the process ended")
            if ends.asked:
                print("saves", step, flush=True)
                ends.saved(step + 1)
    print("evaluates", flush=True)
    time.sleep(30)
finally:
    print("cleans up", flush=True)
    time.sleep(4 if "slowly" in sys.argv else 0)
    print("has cleaned up", flush=True)
"""


def ended(*arguments: str, after: str, signals: list[signal.Signals], pause: float = 1.2) -> tuple[int, list[str], str]:
    """Run STEPS, send signals once it has printed a line; return exit status, the lines after that, and stderr."""
    command = [sys.executable, "-c", STEPS, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while process.stdout.readline().strip() != after:
            assert process.poll() is None
        for index, number in enumerate(signals):
            time.sleep(pause if index else 0.0)
            process.send_signal(number)
        out, error = process.communicate(timeout=60)
    return process.returncode, out.splitlines(), error


def test_a_step_is_saved_although_nobody_reads_what_is_said() -> None:
    """`astar train 2>&1 | tee log`: a signal to the group ends `tee` too."""
    read, write = os.pipe()
    command = [sys.executable, "-c", STEPS, "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=write, text=True) as process:
        os.close(write)
        os.close(read)
        assert process.stdout is not None
        while process.stdout.readline().strip() != "step 1":
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
    assert (process.returncode, out.splitlines()) == (RESUME, ["saves 1", *CLEANED])


CLEANED = ["cleans up", "has cleaned up"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_heeded_where_the_step_is_saved(number: signal.Signals) -> None:
    status, lines, error = ended("0", after="step 1", signals=[number])
    assert (status, lines) == (RESUME, ["saves 1", *CLEANED])
    assert f"{number.name}: ends when this step is saved" in error and "saved after 2 steps" in error


def test_behind_the_steps_it_is_heeded_at_once() -> None:
    status, lines, error = ended("0", after="evaluates", signals=[signal.SIGTERM])
    assert (status, lines) == (RESUME, CLEANED)
    assert "ended by SIGTERM; the same command goes on" in error


def test_the_same_signal_again_at_once_is_no_second_one() -> None:
    status, lines, _ = ended("0", after="step 1", signals=[signal.SIGTERM, signal.SIGTERM], pause=0.1)
    assert (status, lines) == (RESUME, ["saves 1", *CLEANED])


def test_a_second_signal_ends_it_in_the_middle_of_a_step() -> None:
    status, lines, _ = ended("0", "hangs", after="step 2", signals=[signal.SIGUSR1, signal.SIGTERM])
    assert (status, lines) == (RESUME, [])


def test_a_second_signal_ends_it_in_the_middle_of_cleaning_up() -> None:
    status, lines, _ = ended("0", "slowly", after="evaluates", signals=[signal.SIGTERM, signal.SIGTERM])
    assert (status, lines) == (RESUME, ["cleans up"])


def test_where_a_step_does_not_fit_the_time_given_it_is_left() -> None:
    status, lines, error = ended("10.5", after="step 2", signals=[signal.SIGTERM])
    assert (status, lines) == (RESUME, CLEANED)
    assert "1 s of a step do not fit train.grace_seconds=10.5" in error


def test_a_step_that_takes_longer_than_those_before_is_left_when_the_time_is_over() -> None:
    status, lines, error = ended("13", "hangs", after="step 2", signals=[signal.SIGTERM])
    assert (status, lines) == (RESUME, CLEANED)
    assert "ends when this step is saved, in 3 s at most" in error and "was not saved in 3 s" in error


def test_a_signal_that_has_also_ended_the_run_s_processes_is_still_one_to_go_on_from() -> None:
    status, lines, error = ended("0", "fails", after="step 2", signals=[signal.SIGTERM])
    assert (status, lines) == (RESUME, CLEANED)
    assert "policy rank 0: the process ended" in error


def test_an_end_that_ray_has_made_another_of_is_what_the_signal_asked_for() -> None:
    """Ray raises SystemExit(1) from its C++ where a handler raises SystemExit(75)."""
    program = """
import os, signal
from astar_megatron.cluster import signals
signals.heed()
with signals.kept():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except SystemExit:
        raise SystemExit(1)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == RESUME and "ended by SIGTERM" in done.stderr
