"""Rewards in processes beside generation: a reward can neither hang, kill nor slow the driver.

A response whose reward raises, takes longer than `reward.timeout_seconds`, ends its process, or is no number from -1
to 1 is a failure: its reward is None, it is written with its prompt and response to `reward_failures.jsonl`, and once
that holds more than `reward.max_failures` of them the run stops: every program and resume of a run counts there, until
someone moves the file away. Before a run, `check` allows none.

A reward is the user's code on a model's text: its processes inherit no secret and have limits (reward_process.py). They
contain accidents and are no sandbox: SECURITY.md.
"""

import contextlib
import dataclasses
import itertools
import json
import logging
import os
import queue
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, Self

from astar_megatron.algorithm.rewards import RewardError
from astar_megatron.cluster.endings import ended
from astar_megatron.cluster.processes import kill, python, tree
from astar_megatron.config import RewardConfig
from astar_megatron.data.files import storage_error
from astar_megatron.rollout.reward_process import END_SECONDS, LOADED
from astar_megatron.types import Prompt, Rollout

_LOG = logging.getLogger(__name__)
_AT_ONCE = 32  # responses a message
_ENOUGH = 5  # responses that cost their processes, for a reward to be refused before a run
_SAY_SECONDS = 15.0
_START_SECONDS = 120.0  # to import a reward
_LATE_SECONDS = 2.0  # for a process that has killed all below it to end itself
_ENDED = "ended its process"
_TOO_SLOW = "took more than {:g} s (reward.timeout_seconds) and was stopped"
_PROGRAM = (
    "from astar_megatron.rollout import reward_process; "
    "reward_process.main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))"
)
# What a reward gets of the driver's environment, which has keys and tokens too.
_PASSED_ON = {
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "TMPDIR", "TZ", "LANG", "LC_ALL", "LC_CTYPE", "LC_NUMERIC"),
    *("PYTHONPATH", "PYTHONHOME", "PYTHONHASHSEED", "PYTHONUTF8", "PYTHONWARNINGS", "PYTHONDONTWRITEBYTECODE"),
    *("LD_LIBRARY_PATH", "VIRTUAL_ENV", "HF_HOME", "HF_HUB_OFFLINE", "OMP_NUM_THREADS"),
}
_DEVICES = "_VISIBLE_DEVICES"  # the ends of names that keep a reward off the GPUs of others

type Indexed = list[tuple[int, Rollout]]
type Answer = tuple[float | None, str]  # the reward, or why there is none


class Pending:
    """Rollouts on their way through the processes."""

    def __init__(self, rollouts: Indexed, parts: list[Future[list[Answer]]], scorer: "Scorer") -> None:
        self._rollouts, self._parts, self._scorer = rollouts, parts, scorer

    def when_done(self, hear: Callable[["Pending"], None]) -> None:
        """Call `hear`, in any thread, once `result` need not wait."""
        left = itertools.count(len(self._parts) - 1, -1)  # a count is taken by one thread at a time
        for part in self._parts:
            part.add_done_callback(lambda _: None if next(left) else hear(self))

    def result(self) -> Indexed:
        """Return the rollouts with their rewards (None: a failure), once; waits. Raises RewardError after too many."""
        # A part holds who hears of it, hence this: a cycle would keep the rollouts until Python looks for cycles.
        parts, self._parts = self._parts, []
        answers = [answer for part in parts for answer in part.result()]
        return [
            (index, self._scorer.rewarded(rollout, answer))
            for (index, rollout), answer in zip(self._rollouts, answers, strict=True)
        ]


class Scorer:
    """A pool of `num_processes` processes (none: half of the cores, at most 16) that run one reward.

    `folder` is where `reward_failures.jsonl` goes; none: failures are only told, and counted by this Scorer.
    """

    def __init__(self, cfg: RewardConfig, folder: Path | None = None, num_processes: int | None = None) -> None:
        self._cfg = cfg
        self._file = folder / "reward_failures.jsonl" if folder is not None else None
        self._failures = self._counted_bytes = self._counted_file = 0  # and in how many bytes of which inode
        self._tasks: queue.SimpleQueue[tuple[list[tuple[str, str]], Future[list[Answer]]] | None] = queue.SimpleQueue()
        count = num_processes or min(16, max(1, len(os.sched_getaffinity(0)) // 2))
        self._processes = [_Process(cfg) for _ in range(count)]
        self._threads = [threading.Thread(target=self._serve, args=(p,), daemon=True) for p in self._processes]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes, whatever they are doing."""
        for process in self._processes:
            self._tasks.put(None)
            process.close()
        for thread in self._threads:
            thread.join(timeout=10)

    def submit(self, rollouts: Indexed) -> Pending:
        """Begin to score (index, rollout) pairs, one or more, and return at once."""
        return Pending(rollouts, self._begin([rollout for _, rollout in rollouts]), self)

    def score(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """Return the rollouts with their rewards, in order; waits."""
        return [rollout for _, rollout in self.submit(list(enumerate(rollouts))).result()]

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Score an empty response to each prompt, before anything costs: raises RewardError if any of them fails."""
        self._refuse_failures(prompts, self.try_on(prompts))

    def try_on(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """Return what an empty response to each prompt gets, in order; waits, and says how far it is.

        Raises RewardError once a few of them had to be stopped, or ended their processes: all might, one after another.
        """
        rollouts = [_empty_response(prompt) for prompt in prompts]
        parts = [part for rollout in rollouts[:_ENOUGH] for part in self._begin([rollout])]  # the first are soon there
        parts += self._begin(rollouts[_ENOUGH:])
        answers, due = list[Answer](), time.monotonic() + _SAY_SECONDS
        for part in parts:
            while not wait([part], max(0.0, due - time.monotonic())).done:
                _LOG.warning("reward %s: tried on %d of %d prompts", self._cfg.name, len(answers), len(prompts))
                due = time.monotonic() + _SAY_SECONDS
            answers += part.result()
            if sum(process.num_lost for process in self._processes) >= _ENOUGH:
                self._refuse_failures(prompts, answers)
        return answers

    def rewarded(self, rollout: Rollout, answer: Answer) -> Rollout:
        """Return the rollout with the reward of `answer`, None where it failed. Raises RewardError."""
        value, reason = answer
        if value is None:
            self._failed(rollout, reason)
        return dataclasses.replace(rollout, reward=value)

    def _begin(self, rollouts: Sequence[Rollout]) -> list[Future[list[Answer]]]:
        items = [(rollout.text, rollout.prompt.answer) for rollout in rollouts]
        at_once = max(1, min(_AT_ONCE, -(-len(items) // len(self._processes))))
        parts: list[Future[list[Answer]]] = []
        for start in range(0, len(items), at_once):
            parts.append(Future())
            self._tasks.put((items[start : start + at_once], parts[-1]))
        return parts

    def _failed(self, rollout: Rollout, reason: str) -> None:
        text = self._explain(rollout, reason)
        if self._file is None:
            self._failures += 1
        else:
            row = {
                "uid": rollout.prompt.uid,
                "prompt": rollout.prompt.text,
                "answer": rollout.prompt.answer,
                "sample": rollout.sample,
                "version": rollout.last_version,
                "response": rollout.text,
                "reason": reason,
            }
            self._append(self._file, row)
        if self._failures > self._cfg.max_failures:
            where = f" (all are in {self._file}; move it away to count anew)" if self._file is not None else ""
            raise RewardError(
                f"{self._failures} responses could not be scored, reward.max_failures is {self._cfg.max_failures}"
                f"{where}; the last:\n{text}"
            )
        _LOG.warning("response %d that can't be scored: %s", self._failures, text)

    def _append(self, path: Path, row: Mapping[str, Any]) -> None:
        """Write a failure on a line of its own, and count the lines that are new, those of other jobs too."""
        try:
            with path.open("a+b", buffering=0) as file:
                if os.fstat(file.fileno()).st_ino != self._counted_file:  # the first time, or it was moved away
                    self._failures = self._counted_bytes = 0
                    self._counted_file = os.fstat(file.fileno()).st_ino
                file.seek(self._counted_bytes)
                before = file.readall()
                line = (b"\n" if before and not before.endswith(b"\n") else b"") + json.dumps(row).encode() + b"\n"
                while line:  # at once, unless the disk is full: then the rest raises why
                    line = line[file.write(line) :]
                file.seek(self._counted_bytes)
                whole, newline, _ = file.readall().rpartition(b"\n")
        except OSError as error:
            raise storage_error(f"{path}: can't write a failure of the reward", error) from error
        self._failures += (whole + newline).count(b"\n")
        self._counted_bytes += len(whole + newline)

    def _refuse_failures(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> None:
        """Raise RewardError if any of the answers, which the first prompts got, is none."""
        failed = [i for i, (value, _) in enumerate(answers) if value is None]
        if failed:
            tried = f"the first {len(answers)}" if len(answers) < len(prompts) else len(answers)
            raise RewardError(
                f"{len(failed)} of {tried} prompts can't be scored, even with an empty response; the first:\n"
                + self._explain(_empty_response(prompts[failed[0]]), answers[failed[0]][1])
            )

    def _explain(self, rollout: Rollout, reason: str) -> str:
        prompt = rollout.prompt
        return (
            f"reward {self._cfg.name} {reason}\n  prompt {prompt.uid}: {prompt.text!r:.500}\n"
            f"  answer: {prompt.answer!r:.500}\n  response: {rollout.text!r:.500}\n"
            "  repair the reward or the prompt's answer, or choose another reward.name"
        )

    def _serve(self, process: "_Process") -> None:
        """Thread of one process; what it starts dies with it."""
        while (task := self._tasks.get()) is not None:
            _judge(process, *task)
            del task  # while it waits for the next
        process.end()


def _judge(process: "_Process", items: list[tuple[str, str]], future: Future[list[Answer]]) -> None:
    try:
        future.set_result(process.judge(items))
    except RewardError as error:  # it can't be loaded
        future.set_exception(error)
    except Exception as error:  # the waiting driver must hear of it
        future.set_exception(AssertionError(f"scoring: {error!r}"))


class _Process:
    """One process, started when it is first needed and again after each that had to be killed.

    A response is to blame for the end of a process only if it was the first that this process judged: else an earlier
    one may have broken it (closed its input, filled its memory, stopped it), and a fresh process judges the response
    again.
    """

    def __init__(self, cfg: RewardConfig) -> None:
        self._cfg = cfg
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""
        self._judged = 0  # by the process that runs: the number of the next answer
        self.num_lost = 0  # responses that cost their process
        self._closed = False

    def judge(self, items: list[tuple[str, str]]) -> list[Answer]:
        """Return an answer for each (response, answer). Raises RewardError where the reward can't be loaded."""
        answers: list[Answer] = []
        while len(answers) < len(items):
            if self._process is not None and (self._process.poll() is not None or self._has_more()):
                self.end()  # killed from outside while it waited, or it said more than was asked: judge with another
            process = self._process or self._start()
            try:
                self._write(process, json.dumps(items[len(answers) :]).encode() + b"\n")
                while len(answers) < len(items):
                    answers.append(self._read(self._cfg.timeout_seconds, _TOO_SLOW))
                    self._judged += 1
            except (TimeoutError, EOFError, BrokenPipeError) as error:
                if self._closed:
                    raise
                if not self._judged:
                    answers.append((None, str(error) or _ENDED))
                    self.num_lost += 1
                self.end()
        return answers

    def close(self) -> None:
        """End what runs; the thread that serves it hears that and cleans up."""
        self._closed = True
        if (process := self._process) is not None:
            _ask_to_end(process)

    def _start(self) -> subprocess.Popen[bytes]:
        if self._closed:
            raise EOFError("the scorer is closed")
        self._unread, self._judged = b"", LOADED
        self._process = subprocess.Popen(
            python(_PROGRAM, self._cfg.name, *map(str, self._limits())),
            env=environment(os.environ),
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the driver, which then ends them with all that they started
        )
        try:
            value, reason = self._read(_START_SECONDS, "took more than {:g} s to be imported")
        except (TimeoutError, EOFError) as error:
            value, reason = None, str(error)
        if value is None:
            self.end()
            raise RewardError(f"reward.name: {self._cfg.name} can't be loaded in its process: {reason}")
        self._judged = 0
        return self._process

    def _limits(self) -> tuple[int, float, int]:
        return os.getpid(), self._cfg.timeout_seconds, int(self._cfg.memory_gib * 2**30)

    def _write(self, process: subprocess.Popen[bytes], line: bytes) -> None:
        """Hand the process what it judges next. Raises TimeoutError, in words, where it does not take it."""
        assert process.stdin is not None
        until = time.monotonic() + self._cfg.timeout_seconds
        os.set_blocking(process.stdin.fileno(), False)
        poll = select.poll()
        poll.register(process.stdin, select.POLLOUT)
        rest = memoryview(line)
        while rest:
            if not poll.poll(max(0.0, until - time.monotonic()) * 1000):
                raise TimeoutError(_TOO_SLOW.format(self._cfg.timeout_seconds))
            rest = rest[os.write(process.stdin.fileno(), rest) :]

    def _read(self, seconds: float, late: str) -> Answer:
        """The next answer of the process. Raises TimeoutError, in the words of `late`, or EOFError in words."""
        process = self._process
        if process is None or process.stdout is None:
            raise EOFError(_ENDED)
        until = time.monotonic() + seconds
        poll = select.poll()
        poll.register(process.stdout, select.POLLIN)
        while b"\n" not in self._unread:
            if not poll.poll(max(0.0, until - time.monotonic()) * 1000):
                raise TimeoutError(late.format(seconds))
            data = os.read(process.stdout.fileno(), 65536)
            if not data:
                try:
                    raise EOFError(f"{_ENDED}: it {ended(process.wait(max(0.0, until - time.monotonic())))}")
                except subprocess.TimeoutExpired:
                    raise EOFError("closed its process's output") from None
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        try:
            number, value, reason = json.loads(line)
        except (ValueError, TypeError) as error:
            raise EOFError(f"wrote {line[:100]!r} where answers go, and its process was ended") from error
        if number != self._judged:
            raise EOFError(f"gave answer {number} where {self._judged} was due, and its process was ended")
        return value, reason

    def _has_more(self) -> bool:
        assert self._process is not None and self._process.stdout is not None
        poll = select.poll()
        poll.register(self._process.stdout, select.POLLIN)
        return bool(self._unread or poll.poll(0))

    def end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            _ask_to_end(process)
            try:
                process.wait(END_SECONDS + _LATE_SECONDS)
            except subprocess.TimeoutExpired:  # a debugger holds it, or the reward has stopped it again
                kill(tree(process.pid))
                with contextlib.suppress(subprocess.TimeoutExpired):  # what is stuck in the kernel is left to it
                    process.wait(_LATE_SECONDS)
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()


def _ask_to_end(process: subprocess.Popen[bytes]) -> None:
    """Let a process end what the reward has started, and then itself, though the reward has stopped it."""
    process.terminate()
    process.send_signal(signal.SIGCONT)  # before it nothing is heard


def environment(driver: Mapping[str, str]) -> dict[str, str]:
    """Return the part of the driver's environment that a reward gets.

    It computes on one thread where nothing else is said: there are as many processes as there is work for.
    """
    kept = {name: value for name, value in driver.items() if name in _PASSED_ON or name.endswith(_DEVICES)}
    return {"OMP_NUM_THREADS": "1"} | kept


def _empty_response(prompt: Prompt) -> Rollout:
    return Rollout.given(prompt, 0, (), "", truncated=False)
