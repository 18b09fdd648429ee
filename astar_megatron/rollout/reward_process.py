"""The process in which rewards run, away from the driver: what hangs, leaks or dies here is killed and replaced.

One line of JSON in, a list of [response, answer]; one line of JSON out for each as soon as it is judged,
[number, reward or null, why there is none], numbered from 0 on. The line before them, number -1, says whether the
reward could be loaded.

It is two processes: the one that serves, within limits of memory and CPU time, and its keeper, which does nothing but
wait for the other's end, or for the driver's or SIGTERM, and then kills all that the reward has started.
"""

import json
import math
import os
import resource
import signal
import time
from contextlib import suppress
from typing import IO, NoReturn

from astar_megatron.algorithm import rewards
from astar_megatron.cluster.processes import ask_kernel, die_with, process_tree

LOADED = -1  # the number of the line that says whether the reward could be loaded
_LONGEST = 1000  # characters of a reason: 32 of them fit into a pipe
_HEARD = {signal.SIGCHLD, signal.SIGTERM}  # by a keeper
END_SECONDS = 5.0  # for the kernel to end what was killed; what is stuck in it is left to it
_PR_SET_CHILD_SUBREAPER = 36


def main(name: str, parent: int, timeout_seconds: float, memory_bytes: int) -> None:
    """Serve until the input ends. What the reward prints goes to stderr."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _HEARD)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    die_with(parent, signal.SIGTERM)  # a reward that hangs can't see that its input has ended
    ask_kernel(_PR_SET_CHILD_SUBREAPER, 1)  # whoever loses its parent below becomes this process's child
    keeper = os.getpid()
    serving = os.fork()
    if serving:
        _keep(serving)
    os.setpgid(0, 0)
    die_with(keeper, signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HEARD)
    # Not RLIMIT_AS: torch alone maps 3 GiB of which it uses a sixth.
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    _serve(name, timeout_seconds)


def _serve(name: str, timeout_seconds: float) -> None:
    own, (questions, answers) = os.getpid(), _pipes()

    def say(number: int, value: float | None, reason: str) -> None:
        if os.getpid() != own:
            os._exit(1)  # the reward forked, or its module did: the answer is its parent's to give
        answers.write(json.dumps([number, value, reason]) + "\n")
        answers.flush()

    try:
        rewards.version(name)  # imports what the reward imports when it is first used
        reward = rewards.get(name)
    except ValueError as error:
        say(LOADED, None, str(error))
        return
    say(LOADED, 0.0, "")
    number = 0
    for line in questions:
        for response, answer in json.loads(line):
            _limit_cpu(timeout_seconds)
            value, reason = rewards.judge(reward, response, answer)
            say(number, value, reason[:_LONGEST])
            number += 1


def _pipes() -> tuple[IO[bytes], IO[str]]:
    """The driver's pipes, which nothing that a reward starts inherits: its input is empty, what it prints is stderr."""
    questions, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return questions, answers


def _limit_cpu(seconds: float) -> None:
    """Let this process compute no longer than `seconds` on every core, from now on.

    What it starts inherits the limit, which all that this process has computed so far counts into, and begins at 0. The
    driver's deadline comes first while there is a driver that waits.
    """
    times = resource.getrusage(resource.RUSAGE_SELF)
    limit = math.ceil(times.ru_utime + times.ru_stime + seconds * len(os.sched_getaffinity(0))) + 1
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (limit if most == resource.RLIM_INFINITY else min(limit, most), most))


def _keep(serving: int) -> NoReturn:
    """Wait for the end of `serving` or for SIGTERM, kill all that is left, and end as `serving` did."""
    os.close(0)  # so that the driver hears when the other has closed its own
    os.close(1)
    status = None
    while status is None and signal.sigwait(_HEARD) == signal.SIGCHLD:
        status = _reap().get(serving)
    _kill_all(serving)
    code = 0 if status is None else os.waitstatus_to_exitcode(status)
    if code < 0:
        os.kill(os.getpid(), -code)
    os._exit(abs(code))


def _kill_all(group: int) -> None:
    """Kill a process group, which can't grow meanwhile, and all other descendants."""
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    own, until = os.getpid(), time.monotonic() + END_SECONDS
    while (left := process_tree(own) - {own}) and time.monotonic() < until:
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
        _reap()


def _reap() -> dict[int, int]:
    """Return the statuses of the children that have ended, by number."""
    statuses = {}
    with suppress(ChildProcessError):  # there are no others
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            statuses[ended[0]] = ended[1]
    return statuses
