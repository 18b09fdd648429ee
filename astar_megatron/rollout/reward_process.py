"""The process in which rewards run, away from the driver: what hangs, leaks or dies here is killed and replaced.

One line of JSON in, a list of [response, answer]; one line of JSON out for each as soon as it is judged,
[number, reward or null, why there is none], numbered from 0 on. The first line out, number 0 too, says whether the
reward could be loaded.

It is two processes: the one that serves, within limits of memory and CPU time, and its keeper, which does nothing but
wait for the other's end, or for the driver's or SIGTERM, and then kills all that the reward has started.
"""

import json
import math
import os
import resource
import signal
import sys
import time
from contextlib import suppress
from typing import IO, NoReturn

from astar_megatron.algorithm import rewards
from astar_megatron.cluster.processes import ask_kernel, die_with, process_tree

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
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        rewards.version(name)  # imports what the reward imports when it is first used
        reward = rewards.get(name)
    except ValueError as error:
        _say(answers, [0, None, str(error)])
        return
    _say(answers, [0, 0.0, ""])
    own, number = os.getpid(), 0
    for line in sys.stdin.buffer:
        for response, answer in json.loads(line):
            _limit_cpu(timeout_seconds)
            value, reason = rewards.judge(reward, response, answer)
            if os.getpid() != own:
                os._exit(1)  # the reward forked: the answer is its parent's to give
            _say(answers, [number, value, reason[:_LONGEST]])
            number += 1


def _say(answers: IO[str], answer: list[object]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def _limit_cpu(seconds: float) -> None:
    """Let this process compute no longer than `seconds` on every core; so much has each that it starts from now on.

    The driver's deadline comes first while there is a driver that waits.
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
