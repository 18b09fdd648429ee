"""The process in which rewards run, away from the driver: what hangs, leaks or dies here is killed and replaced.

One line of JSON in, a list of [response, answer]; one line of JSON out for each as soon as it is judged,
[number, reward or null, why there is none], numbered from 0 on. The first line out, number 0 too, says whether the
reward could be loaded.
"""

import ctypes
import json
import os
import signal
import sys
from typing import IO

from astar_megatron.algorithm import rewards

_LONGEST = 1000  # characters of a reason: 32 of them fit into a pipe


def main(name: str, parent: int) -> None:
    """Serve until the input ends. What the reward prints goes to stderr."""
    _die_with(parent)
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
            value, reason = rewards.judge(reward, response, answer)
            if os.getpid() != own:
                os._exit(1)  # the reward forked: the answer is its parent's to give
            _say(answers, [number, value, reason[:_LONGEST]])
            number += 1


def _say(answers: IO[str], answer: list[object]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def _die_with(parent: int) -> None:
    """Ask the kernel to end this process with the driver: a reward that hangs can't see that its input has ended."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)  # Linux only
    if prctl is not None:
        prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        sys.exit(1)
