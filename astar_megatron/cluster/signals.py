"""How a program ends on SIGTERM and SIGUSR1: with the exit status RESUME, "the same command goes on from here".

At once, as on an error, so that what is half written is removed; training at the end of a step, which it saves first,
unless the time given is too short for it. A second signal ends the process and nothing else: what it has started is
then ended by caretaker.py. Ctrl-C (SIGINT) is Python's own. A program that waits for another passes all of them on to
it, which may so hear of one twice: what comes again within a second is no second one.
"""

import contextlib
import math
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

from astar_megatron.cluster.errors import ClusterError

RESUME = 75  # EX_TEMPFAIL of sysexits.h: what failed may be tried again
LOST = 69  # EX_UNAVAILABLE: a process of the run ended by itself; the same command goes on too, if that was chance
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_UNHEEDED = (-signal.SIGTERM, -signal.SIGUSR1, 128 + signal.SIGTERM)  # the last as a shell says it
_SAME_SECONDS = 1.0  # a terminal and `timeout` send to all of a group, in which one may pass it on to the other
_END_SECONDS = 10.0  # of the time given, for the run's processes to end in
_ends: list[SystemExit] = []  # that signals have asked for


def heed() -> None:
    """End this process at once, with RESUME, when a signal comes. For the command line, once, in the main thread.

    SIGINT raises KeyboardInterrupt as ever, unless it is ignored.
    """
    _ends.clear()
    _call_on_first(_end_at_once)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt_once())


class TimeIsUp(SystemExit):
    """The end of a run whose time after a signal is over: nothing is waited for any more."""


class StepEnds:
    """Within it signals are heeded where a step has been saved. A context manager, for the main thread.

    With `grace_seconds` the process may live so long after the signal: where the step will not be saved by then, to
    judge by the last few, or is not, it ends at once, and with it what was done since the last checkpoint.
    """

    def __init__(self, grace_seconds: float | None) -> None:
        self.asked = False
        self._grace_seconds = grace_seconds
        self._seconds: deque[float] = deque(maxlen=5)  # of the last steps, with what came after them
        self._begun = time.monotonic()
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._handlers = {number: signal.getsignal(number) for number in _SIGNALS}
        _call_on_first(self._ask)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        if self.asked and isinstance(error, ClusterError):  # sent to every process of a run, it has ended others
            _end_at_once(f"a signal; before the step was saved: {str(error).splitlines()[-1]}")
        self._leave()

    def steps(self, steps: Iterable[int]) -> Iterator[int]:
        """Yield `steps`; after the last one signals are heeded as before."""
        for step in steps:
            self._begun = time.monotonic()
            yield step
            self._seconds.append(time.monotonic() - self._begun)
        self._leave()
        if self.asked:
            _end_at_once("a signal")

    def saved(self, step: int) -> None:
        """End the process where a signal has come. To be called when a checkpoint after `step` steps is on disk."""
        if self.asked:
            _say(f"saved after {step} steps; the same command goes on from there")
            raise SystemExit(RESUME)

    def _leave(self) -> None:
        if not self.asked:  # else the next signal is the second one
            for number, handler in self._handlers.items():
                signal.signal(number, handler)

    def _ask(self, name: str) -> None:
        self.asked = True
        if self._grace_seconds is None:
            _say(f"{name}: ends when this step is saved; a second signal ends it at once")
            return
        left = max(self._seconds, default=0.0) - (time.monotonic() - self._begun)
        most = self._grace_seconds - _END_SECONDS
        too_short = f"{left:.0f} s of a step do not fit train.grace_seconds={self._grace_seconds:g}"
        if most <= 0.0:
            _end_at_once(f"{name}, and {too_short}", TimeIsUp)
        over = f"{name}, and the step was not saved in {most:.0f} s"
        signal.signal(signal.SIGALRM, lambda *_: _end_at_once(over, TimeIsUp))
        signal.setitimer(signal.ITIMER_REAL, most)  # also for a checkpoint that is being written
        if most <= left:
            _end_at_once(f"{name}, and {too_short}")
        _say(f"{name}: ends when this step is saved, in {most:.0f} s at most; a second signal ends it at once")


class PassedOn:
    """Passes what asks this program to end on to the process that it waits for. For the main thread.

    SIGINT too, unless it is ignored, as in the background. Who has sent it can't be told: a terminal, to all of the
    group, or another program, to this one. So that process may have had it already, and `heed`s it once.
    """

    def __init__(self) -> None:
        self.asked = 0  # the number of the last signal; 0: none has come
        self._process: subprocess.Popen[bytes] | None = None
        for number in (*_SIGNALS, signal.SIGINT):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._hear)

    def _hear(self, number: int, _frame: object) -> None:
        self.asked = number
        if self._process is not None:
            self._process.send_signal(number)

    def wait(self, process: subprocess.Popen[bytes]) -> int:
        """Wait for the end of a process and return its status; a signal that came before its start reaches it now."""
        self._process = process
        if self.asked:
            process.send_signal(self.asked)
        status = process.wait()
        self._process = None
        return status

    def exit_status(self, status: int) -> int:
        """Return what this program has to end with after such a process: RESUME where it was ended before it heeded."""
        if self.asked and status in _UNHEEDED:
            return RESUME
        return status if status >= 0 else 128 - status


def _call_on_first(act: Callable[[str], None]) -> None:
    """Call `act` with the name of the first signal that comes; a later one ends the process, whatever it is doing."""
    first: float | None = None

    def hear(number: int, _frame: object) -> None:
        nonlocal first
        now = time.monotonic()
        if first is None:
            first = now
            act(signal.Signals(number).name)
        elif now - first > _SAME_SECONDS:
            os._exit(RESUME)

    for number in _SIGNALS:
        signal.signal(number, hear)


def _interrupt_once() -> Callable[[int, FrameType | None], None]:
    """Return Python's handler of SIGINT, for which one that comes again at once is the same."""
    last = -math.inf

    def hear(number: int, frame: FrameType | None) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > _SAME_SECONDS:
            last = now
            signal.default_int_handler(number, frame)

    return hear


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Within it the end that a signal has asked for stays what it is: Ray makes another of one raised in its calls."""
    try:
        yield
    except SystemExit as error:
        raise (_ends or [error])[-1] from None


def _end_at_once(reason: str, end: type[SystemExit] = SystemExit) -> NoReturn:
    _say(f"ended by {reason}; the same command goes on")
    _ends.append(end(RESUME))
    raise _ends[-1]


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # whoever read it may have had the signal too
        os.write(2, f"astar: {text}\n".encode())  # print may be what the signal has interrupted
