"""PROGRAM: `astar train --supervise`, training in a process of its own that is started again when chance has ended it.

Chance: it was killed, a process of the run was, or a signal asked it to go on later. Not: what it has refused, an error
of its own, Ctrl-C. A signal that comes here is passed on, and then nothing is started again. The restarts end after
`supervise.max_restarts_per_hour`, and after one that brought no step: a bundle of what there is to look at is left.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from astar_megatron.cluster.endings import ended, ended_by_ray
from astar_megatron.cluster.signals import LOST, RESUME, PassedOn
from astar_megatron.config import RunConfig
from astar_megatron.run import bundle, commands
from astar_megatron.run.tracking import PLACEMENT_FILE, Screen, read_metrics

_HOUR = 3600.0
_OUTPUT_BYTES = 1 << 20  # of the child's output, kept for a bundle
_CARE_SECONDS = 30.0  # for what a killed child has started to be ended; see cluster/caretaker.py
_REFUSED = 2  # before a run has begun that needs no bundle
_BY_USER = 128 + signal.SIGINT


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildEnd:
    """How a child ended: its status as `subprocess` has it, its process number, the end of its output."""

    status: int
    pid: int = 0
    output: str = ""


def main(cfg: RunConfig, words: Sequence[str]) -> int:
    """Run `astar WORDS`, a training under `cfg`, until it ends for good; return the exit status of the last one."""
    signals, screen = PassedOn(), Screen()
    end, reason = supervise(cfg, lambda: run_child(words, signals), lambda: bool(signals.asked), screen)
    if reason:
        why = f"astar {' '.join(words)}\nThe last process {ended(end.status)}: {reason}."
        try:
            folder = bundle.leave(cfg, why, end.output, end.pid)
            screen.say(f"supervise: {ended(end.status)}; {reason}; what there is to look at lies in {folder}")
        except OSError as error:
            screen.say(f"supervise: {ended(end.status)}; {reason}; {error}")
    return signals.exit_status(end.status)


def supervise(
    cfg: RunConfig,
    run: Callable[[], ChildEnd],
    is_stopped: Callable[[], bool],
    screen: Screen,
    now: Callable[[], float] = time.monotonic,
) -> tuple[ChildEnd, str]:
    """Call `run` until it ends for good; return that end, and why it was not run again if a bundle is due ("": none).

    `is_stopped` says whether somebody has asked for the end.
    """
    restarts: list[float] = []
    most = _steps(cfg.run_dir)
    while True:
        before = _placed(cfg.run_dir)
        end = run()
        steps, has_begun = _steps(cfg.run_dir), _placed(cfg.run_dir) != before
        if end.status in (0, _BY_USER) or is_stopped() or (end.status == _REFUSED and not has_begun):
            return end, ""
        if not (end.status < 0 or end.status in (LOST, RESUME) or ended_by_ray(end.status, end.output)):
            return end, "a restart does not mend that"
        moment = now()
        recent = [earlier for earlier in restarts if earlier > moment - _HOUR]
        if len(recent) >= cfg.supervise.max_restarts_per_hour:
            return end, f"{len(recent)} restarts within an hour (supervise.max_restarts_per_hour)"
        if restarts and steps <= most:
            return end, f"the last restart brought no step beyond {most}"
        most = max(most, steps)
        restarts.append(moment)
        screen.say(f"supervise: {ended(end.status)} after {steps} steps; started again, restart {len(restarts)}")


def run_child(words: Sequence[str], signals: PassedOn) -> ChildEnd:
    """Run `astar WORDS` to its end, and that of all that it had started; its output is shown."""
    process = commands.start(words, subprocess.PIPE, own_group=True)
    assert process.stdout is not None
    output = bytearray()
    reader = threading.Thread(target=_show, args=(process.stdout.fileno(), output), daemon=True)
    reader.start()
    status = signals.wait(process)
    reader.join(_CARE_SECONDS)
    return ChildEnd(status=status, pid=process.pid, output=output.decode(errors="replace"))


def _show(descriptor: int, output: bytearray) -> None:
    """Copy what comes to this program's output, and keep its end in `output`."""
    while data := os.read(descriptor, 65536):
        output += data
        del output[:-_OUTPUT_BYTES]
        with suppress(OSError):  # nobody reads it any more; the child must not wait for that
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()


def _placed(run_dir: str) -> int | None:
    """When a run last had its processes placed, in nanoseconds."""
    with suppress(OSError):
        return (Path(run_dir) / PLACEMENT_FILE).stat().st_mtime_ns
    return None


def _steps(run_dir: str) -> int:
    """How many steps the metrics of a run know."""
    with suppress(ValueError):
        return max((line["step"] + 1 for line in read_metrics(Path(run_dir))), default=0)
    return 0
