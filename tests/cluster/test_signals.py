"""How a program ends on SIGTERM and SIGUSR1: at once, or where a step is saved; a second signal ends it in any case.

And how one that waits for another passes them, and SIGINT, on.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

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


# Of each program: its arguments, the line after which signals are sent, which, and the seconds between two.
PROGRAMS: dict[str, tuple[list[str], str, list[signal.Signals], float]] = {
    "asked by SIGTERM": (["0"], "step 1", [signal.SIGTERM], 0.0),
    "asked by SIGUSR1": (["0"], "step 1", [signal.SIGUSR1], 0.0),
    "asked behind the steps": (["0"], "evaluates", [signal.SIGTERM], 0.0),
    "asked twice at once": (["0"], "step 1", [signal.SIGTERM, signal.SIGTERM], 0.1),
    "asked again in a step": (["0", "hangs"], "step 2", [signal.SIGUSR1, signal.SIGTERM], 2.5),
    "asked again in cleaning up": (["0", "slowly"], "evaluates", [signal.SIGTERM, signal.SIGTERM], 2.5),
    "a step does not fit": (["10.5"], "step 2", [signal.SIGTERM], 0.0),
    "a step takes longer": (["13", "hangs"], "step 2", [signal.SIGTERM], 0.0),
    "its processes ended too": (["0", "fails"], "step 2", [signal.SIGTERM], 0.0),
    "interrupted twice at once": (["0", "slowly"], "step 1", [signal.SIGINT, signal.SIGINT], 0.1),
    "interrupted again": (["0", "slowly"], "step 1", [signal.SIGINT, signal.SIGINT], 2.5),
    "interrupted in the background": (["0", "ignores"], "step 1", [signal.SIGINT, signal.SIGTERM], 0.1),
}
CLEANED = ["cleans up", "has cleaned up"]

type Ended = tuple[int, list[str], str]


def env(*, ignores: bool = False) -> list[str]:
    """What a command begins with that heeds Ctrl-C, as in the foreground, or ignores it, as tests may themselves."""
    return ["env", f"--{'ignore' if ignores else 'default'}-signal=INT"]


def run(arguments: list[str], after: str, signals: list[signal.Signals], pause: float) -> Ended:
    """Run STEPS, send signals once it has printed a line; return exit status, the lines after that, and stderr."""
    command = [*env(ignores="ignores" in arguments), sys.executable, "-c", STEPS, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while process.stdout.readline().strip() != after:
            assert process.poll() is None
        for index, number in enumerate(signals):
            time.sleep(pause if index else 0.0)
            process.send_signal(number)
        out, error = process.communicate(timeout=60)
    return process.returncode, out.splitlines(), error


@pytest.fixture(scope="module")
def ended() -> Iterator[Callable[[str], Ended]]:
    """Return a function that waits for a program and gives its end; all run at once, for they mostly sleep."""
    with ThreadPoolExecutor(len(PROGRAMS)) as pool:
        ends = {name: pool.submit(run, *program) for name, program in PROGRAMS.items()}
        yield lambda name: ends[name].result()


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


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_is_heeded_where_the_step_is_saved(name: str, ended: Callable[[str], Ended]) -> None:
    status, lines, error = ended(f"asked by {name}")
    assert (status, lines) == (RESUME, ["saves 1", *CLEANED])
    assert f"{name}: ends when this step is saved" in error and "saved after 2 steps" in error


def test_behind_the_steps_it_is_heeded_at_once(ended: Callable[[str], Ended]) -> None:
    status, lines, error = ended("asked behind the steps")
    assert (status, lines) == (RESUME, CLEANED)
    assert "ended by SIGTERM; the same command goes on" in error


def test_the_same_signal_again_at_once_is_no_second_one(ended: Callable[[str], Ended]) -> None:
    status, lines, _ = ended("asked twice at once")
    assert (status, lines) == (RESUME, ["saves 1", *CLEANED])


def test_a_second_signal_ends_it_in_the_middle_of_a_step(ended: Callable[[str], Ended]) -> None:
    status, lines, _ = ended("asked again in a step")
    assert (status, lines) == (RESUME, [])


def test_a_second_signal_ends_it_in_the_middle_of_cleaning_up(ended: Callable[[str], Ended]) -> None:
    status, lines, _ = ended("asked again in cleaning up")
    assert (status, lines) == (RESUME, ["cleans up"])


def test_where_a_step_does_not_fit_the_time_given_it_is_left(ended: Callable[[str], Ended]) -> None:
    status, lines, error = ended("a step does not fit")
    assert (status, lines) == (RESUME, CLEANED)
    assert "1 s of a step do not fit train.grace_seconds=10.5" in error


def test_a_step_that_takes_longer_than_those_before_is_left_when_the_time_is_over(
    ended: Callable[[str], Ended],
) -> None:
    status, lines, error = ended("a step takes longer")
    assert (status, lines) == (RESUME, CLEANED)
    assert "ends when this step is saved, in 3 s at most" in error and "was not saved in 3 s" in error


def test_a_signal_that_has_also_ended_the_run_s_processes_is_still_one_to_go_on_from(
    ended: Callable[[str], Ended],
) -> None:
    status, lines, error = ended("its processes ended too")
    assert (status, lines) == (RESUME, CLEANED)
    assert "policy rank 0: the process ended" in error


def test_ctrl_c_that_comes_again_at_once_does_not_break_off_cleaning_up(ended: Callable[[str], Ended]) -> None:
    status, lines, error = ended("interrupted twice at once")
    assert (status, lines) == (-signal.SIGINT, CLEANED) and "KeyboardInterrupt" in error


def test_a_second_ctrl_c_breaks_off_cleaning_up(ended: Callable[[str], Ended]) -> None:
    status, lines, _ = ended("interrupted again")
    assert (status, lines) == (-signal.SIGINT, ["cleans up"])


def test_ctrl_c_is_ignored_in_the_background(ended: Callable[[str], Ended]) -> None:
    status, lines, _ = ended("interrupted in the background")
    assert (status, lines) == (RESUME, ["saves 1", *CLEANED])


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


# --- a program that waits for another; arguments: a signal that it has before that begins (0: none), the other's words

WAITS = """
import os, subprocess, sys
from astar_megatron.cluster.signals import PassedOn
signals = PassedOn()
os.kill(os.getpid(), int(sys.argv[1]))
sys.exit(signals.exit_status(signals.wait(subprocess.Popen(sys.argv[2:]))))
"""


@contextlib.contextmanager
def waiting(*words: str, early: int = 0) -> Iterator[subprocess.Popen[str]]:
    """The waiting program, in a group with the one that it waits for; both are ended."""
    command = [*env(), sys.executable, "-c", WAITS, str(early), *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("send", [os.kill, os.killpg])  # as a program sends it, and as a terminal or `timeout` does
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, RESUME), (signal.SIGINT, 130)])
def test_a_signal_is_passed_on_and_heeded_once_however_often_it_comes(
    number: signal.Signals, status: int, send: Callable[[int, int], None]
) -> None:
    with waiting(sys.executable, "-c", STEPS, "0", "slowly") as process:
        assert process.stdout is not None
        while process.stdout.readline().strip() != "step 1":
            assert process.poll() is None
        send(process.pid, number)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == status
    assert out.splitlines() == ([] if number == signal.SIGINT else ["saves 1"]) + CLEANED


def test_a_signal_that_comes_before_the_process_reaches_it() -> None:
    with waiting("sleep", "60", early=signal.SIGTERM) as process:
        assert process.wait(30) == RESUME
