"""Scoring in processes: the same rewards as the function's, in order, and no reward can hang or end the driver."""

import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import samples

from astar_megatron.algorithm import rewards
from astar_megatron.algorithm.rewards import RewardError
from astar_megatron.config import RewardConfig
from astar_megatron.data.files import StorageError
from astar_megatron.rollout import scoring
from astar_megatron.rollout.scoring import Pending, Scorer
from astar_megatron.types import Prompt, Rollout

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def _faulty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))


def _faulty_scorer(folder: Path | None = None, seconds: float = 60.0, max_failures: int = 100) -> Scorer:
    cfg = RewardConfig(name="faulty_reward:reward", timeout_seconds=seconds, max_failures=max_failures)
    return Scorer(cfg, folder, num_processes=2)


def _rollout(text: str, answer: str = "7", uid: str = "u1") -> Rollout:
    prompt = Prompt(uid=uid, token_ids=(1,), text="What is 3 + 4?", answer=answer)
    return samples.rollout(prompt, sample=3, text=text, last_version=5, reward=None)


def _rewards(scorer: Scorer, *rollouts: Rollout) -> list[float | None]:
    return [rollout.reward for rollout in scorer.score(rollouts)]


def test_processes_give_the_rewards_of_the_function_in_order_and_change_nothing_else() -> None:
    texts = [f"#### {number}" for number in (7, 8)] * 50 + ["", "7" * 1_000_000, "\ud800", "#### 7\n\u2028 \0"]
    rollouts = [_rollout(text) for text in texts]
    with Scorer(RewardConfig(name="gsm8k_strict"), num_processes=3) as scorer:
        scored = scorer.score(rollouts)
    reward = rewards.get("gsm8k_strict")
    assert [rollout.reward for rollout in scored] == [reward(text, "7") for text in texts]
    assert {0.0, 1.0} == {rollout.reward for rollout in scored}
    assert [dataclasses.replace(rollout, reward=None) for rollout in scored] == rollouts


def test_whoever_asks_hears_when_rollouts_are_scored_and_need_not_wait() -> None:
    done: queue.SimpleQueue[Pending] = queue.SimpleQueue()
    with Scorer(RewardConfig(name="last_number"), num_processes=2) as scorer:
        for numbers in ([2, 0], list(range(3, 203)), [1]):  # of one message, of several, of a single response
            scorer.submit([(number, _rollout(f"{7 + number % 2}")) for number in numbers]).when_done(done.put)
        scored = dict(pair for _ in range(3) for pair in done.get(timeout=60).result())
    assert {number: rollout.reward for number, rollout in scored.items()} == {
        number: float(number % 2 == 0) for number in range(203)
    }


def test_each_way_to_fail_gives_no_reward_and_is_written_with_prompt_and_response(tmp_path: Path) -> None:
    ways = {
        "hang": "took more than 3 s (reward.timeout_seconds) and was stopped",
        "die": "ended its process: it ended with exit status 3",
        "raise": "raised KeyError: 'boom'",
        "nan": "returned nan, expected a number from -1 to 1",
        "two": "returned 2.0, expected",
        "text": "returned '1.0', expected",
        "nothing": "returned None, expected",
    }
    texts = [text for way in ways for text in ("fine", way)]
    with _faulty_scorer(tmp_path, seconds=3.0, max_failures=len(ways)) as scorer:
        scored = scorer.score([_rollout(text, uid=f"u{i}") for i, text in enumerate(texts)])
        assert [rollout.reward for rollout in scored] == [0.5, None] * len(ways)
        rows = [json.loads(line) for line in (tmp_path / "reward_failures.jsonl").read_text().splitlines()]
        assert [row["response"] for row in rows] == list(ways)
        assert [row["uid"] for row in rows] == [f"u{2 * i + 1}" for i in range(len(ways))]
        assert all(row["reason"].startswith(reason) for row, reason in zip(rows, ways.values(), strict=True))
        assert {(row["prompt"], row["answer"], row["sample"], row["version"]) for row in rows} == {
            ("What is 3 + 4?", "7", 3, 5)
        }
        with pytest.raises(RewardError, match=r"8 responses could not be scored, reward\.max_failures is 7"):
            scorer.score([_rollout("fine"), _rollout("raise")])


def test_a_failure_is_told_with_the_beginning_of_a_long_response() -> None:
    with (
        Scorer(RewardConfig(name="last_number", max_failures=0)) as scorer,
        pytest.raises(RewardError) as caught,
    ):
        scorer.score([_rollout("r" * 10_000, answer="Paris")])
    message = str(caught.value)
    assert "last_number raised ValueError: answer: expected a number, got 'Paris'" in message
    assert "What is 3 + 4?" in message and "u1" in message
    assert "r" * 400 in message and "r" * 501 not in message


def test_failures_of_all_scorers_of_a_run_count_together(tmp_path: Path) -> None:
    for number in (1, 2):
        with _faulty_scorer(tmp_path, max_failures=2) as scorer:
            assert _rewards(scorer, _rollout("raise"), _rollout("fine")) == [None, 0.5]
            assert len((tmp_path / "reward_failures.jsonl").read_bytes().splitlines()) == number
    with _faulty_scorer(tmp_path, max_failures=2) as scorer:
        assert _rewards(scorer, _rollout("fine")) == [0.5]
        with pytest.raises(RewardError, match=r"3 responses could not be scored, reward\.max_failures is 2 .*move it"):
            scorer.score([_rollout("raise")])


def test_a_failure_begins_on_a_new_line_and_counts_again_after_the_file_was_moved_away(tmp_path: Path) -> None:
    failures = tmp_path / "reward_failures.jsonl"
    failures.write_text('{"cut')
    with _faulty_scorer(tmp_path, max_failures=2) as scorer:
        _rewards(scorer, _rollout("raise"))
        cut, row = failures.read_text().splitlines()
        assert (cut, json.loads(row)["response"]) == ('{"cut', "raise")
        failures.rename(tmp_path / "moved.jsonl")
        assert _rewards(scorer, _rollout("raise"), _rollout("raise")) == [None, None]
        with failures.open("a") as file:
            file.write("of another job\n")
        with pytest.raises(RewardError, match=r"4 responses could not be scored, reward\.max_failures is 2"):
            scorer.score([_rollout("raise")])


def test_a_full_disk_under_the_failures_is_named_with_their_file(tmp_path: Path) -> None:
    with _faulty_scorer(tmp_path) as scorer:
        _rewards(scorer, _rollout("raise"))
        limit = (tmp_path / "reward_failures.jsonl").stat().st_size + 10  # within the next row
        words = r"reward_failures\.jsonl: can't write a failure of the reward: .*free some space"
        with samples.files_of_at_most(limit), pytest.raises(StorageError, match=words):
            scorer.score([_rollout("raise")])


@pytest.mark.parametrize("way", ["fork", "closes its input", "closes its output", "writes more", "writes junk"])
def test_what_a_reward_does_to_its_process_changes_no_other_reward(way: str, tmp_path: Path) -> None:
    values = ["0.25", "0.75", "-0.5"]
    with Scorer(RewardConfig(name="faulty_reward:echo", timeout_seconds=20.0), num_processes=1) as scorer:
        texts = ["", way, "", ""]
        first, _, *others = _rewards(scorer, *map(_rollout, texts, ["1", "0.5", *values[:2]]))
        assert [first, *others] == [1.0, 0.25, 0.75]
        time.sleep(0.5 if way == "fork" else 0.0)  # until the child returns
        assert _rewards(scorer, *(_rollout("", value) for value in values)) == [0.25, 0.75, -0.5]


def test_a_module_that_forks_when_it_is_imported_changes_no_reward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "forks.py").write_text(
        "import os\nos.fork()\n\ndef reward(response, answer):\n    return float(answer)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    values = ["0.25", "0.75", "-0.5"]
    with Scorer(RewardConfig(name="forks:reward"), num_processes=1) as scorer:
        assert _rewards(scorer, *(_rollout("", value) for value in values)) == [0.25, 0.75, -0.5]


@pytest.mark.parametrize("characters", [10, 100_000])
def test_a_process_that_stands_still_costs_no_response_its_reward(characters: int) -> None:
    """Not even one that is longer than a pipe takes."""
    with Scorer(RewardConfig(name="faulty_reward:echo", timeout_seconds=2.0), num_processes=1) as scorer:
        assert _rewards(scorer, _rollout("stops", "0.5")) == [0.5]
        _wait_for(lambda: any(_state(pid) == "T" for pid in _running(os.getpid())))
        long = [_rollout("y" * characters, value) for value in ("0.25", "0.75")]
        assert _rewards(scorer, *long) == [0.25, 0.75]


def test_a_reward_that_stops_what_keeps_it_costs_one_response_and_ends() -> None:
    with Scorer(RewardConfig(name="faulty_reward:echo", timeout_seconds=2.0), num_processes=1) as scorer:
        assert _rewards(scorer, _rollout("stops its keeper", "0.5"), _rollout("", "0.25")) == [None, 0.25]
        assert len(_running(os.getpid())) == 2


DEAF = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.fork()
print(os.getpid(), flush=True)
time.sleep(600)
"""


def test_a_process_that_hears_nothing_is_killed_with_all_below_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "END_SECONDS", 0.0)
    monkeypatch.setattr(scoring, "_LATE_SECONDS", 0.1)
    process = scoring._Process(RewardConfig(name="faulty_reward:echo"))
    process._process = subprocess.Popen([sys.executable, "-c", DEAF], stdout=subprocess.PIPE, bufsize=0)
    assert process._process.stdout is not None
    statuses = [Path("/proc", process._process.stdout.readline().decode().strip(), "status") for _ in range(2)]
    process.end()
    for status in statuses:
        _wait_for(lambda status=status: not status.exists() or "State:\tZ" in status.read_text())


def test_what_a_stopped_reward_has_started_ends_with_it(tmp_path: Path) -> None:
    started = tmp_path / "pid"
    with Scorer(RewardConfig(name="faulty_reward:start", timeout_seconds=3.0), num_processes=1) as scorer:
        assert _rewards(scorer, _rollout("", answer=str(started))) == [None]
        status = Path("/proc", started.read_text(), "status")
        _wait_for(lambda: not status.exists() or "State:\tZ" in status.read_text())


@pytest.mark.parametrize("then", ["hang", "die"])
def test_a_reward_that_forks_and_forks_leaves_no_process_whether_it_is_stopped_or_ends_itself(
    then: str, tmp_path: Path
) -> None:
    started = tmp_path / "pids"
    with Scorer(RewardConfig(name="faulty_reward:bomb", timeout_seconds=5.0), num_processes=1) as scorer:
        assert _rewards(scorer, _rollout(then, answer=str(started))) == [None]
        pids = started.read_text().split()
        assert len(set(pids)) == 64
        assert not [pid for pid in pids if Path("/proc", pid).exists()]  # they end before the answer is there


def test_a_reward_inherits_no_secret_and_no_open_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = dict.fromkeys(
        ("RAY_AUTH_TOKEN", "WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "HTTPS_PROXY", "DB_USER", "MY_HOME"),
        "hunter2",
    )
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SOME_VISIBLE_DEVICES", "3")
    with (
        (tmp_path / "private").open("w") as private,
        Scorer(RewardConfig(name="faulty_reward:tell"), num_processes=1) as scorer,
    ):
        os.set_inheritable(private.fileno(), True)
        assert _rewards(scorer, _rollout("", answer=str(tmp_path / "told"))) == [0.5]
    text = (tmp_path / "told").read_text()
    told = json.loads(text)
    assert "hunter2" not in text and not secrets.keys() & told["environ"].keys()
    assert told["environ"]["PATH"] == os.environ["PATH"] and told["environ"]["SOME_VISIBLE_DEVICES"] == "3"
    assert told["inherited"] and str(tmp_path / "private") not in told["files"]
    assert told["input"] == "/dev/null"  # a program that it starts, and that reads, takes nothing of what is asked


def test_a_reward_that_fills_its_memory_fails_alone_and_is_told_the_key() -> None:
    cfg = RewardConfig(name="faulty_reward:fill", memory_gib=0.5)
    with Scorer(cfg, num_processes=1) as scorer:
        (answers,) = [part.result() for part in scorer._begin([_rollout("800"), _rollout("100")])]
    assert answers == [(None, "raised MemoryError: ; reward.memory_gib limits its process"), (0.5, "")]


CPU = f"""
import json, os, signal, subprocess, sys
from astar_megatron.config import RewardConfig
from astar_megatron.rollout import scoring
os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])
sys.path.append({str(HERE)!r})
process = scoring._Process(RewardConfig(name="faulty_reward:reward", timeout_seconds=1.0))._start()
process.stdin.write(json.dumps([["hang", "7"]]).encode() + os.linesep.encode())
process.stdin.flush()
print(signal.Signals(-process.wait(120)).name)
"""


def test_a_reward_that_nobody_stops_ends_when_its_cpu_time_is_used_up() -> None:
    assert samples.output_of(CPU) == "SIGXCPU\n"


def test_check_allows_no_failure_and_counts_them_before_anything_is_generated() -> None:
    readable, unreadable = _rollout("").prompt, _rollout("", answer="unreadable", uid="u2").prompt
    with _faulty_scorer() as scorer:
        scorer.check([readable] * 40)
        with pytest.raises(RewardError, match=r"(?s)2 of 41 prompts can't be scored.*u2.*unreadable"):
            scorer.check([*[readable] * 39, unreadable, unreadable])


def test_check_ends_after_a_few_prompts_that_each_take_too_long() -> None:
    slow = [_rollout("", answer="slow").prompt] * 1000
    with (
        _faulty_scorer(seconds=0.3) as scorer,
        pytest.raises(RewardError, match=r"(?s)^(\d) of the first \1 prompts can't be scored.*took more than 0.3 s"),
    ):
        scorer.check(slow)
    assert sum(process.num_lost for process in scorer._processes) < 10


def test_check_says_how_far_it_is_where_it_takes_long(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("astar_megatron.rollout.scoring._SAY_SECONDS", 0.01)
    with _faulty_scorer() as scorer:
        scorer.check([_rollout("").prompt] * 20)
    assert "reward faulty_reward:reward: tried on 0 of 20 prompts" in caplog.text


def test_a_reward_that_cannot_be_loaded_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with Scorer(RewardConfig(name="no_such_module:reward")) as scorer, pytest.raises(RewardError, match="no_such_mod"):
        scorer.score([_rollout("7")])
    with Scorer(RewardConfig(name="gsm8k_strikt")) as scorer, pytest.raises(RewardError, match="nearest is gsm8k_str"):
        scorer.check([_rollout("7").prompt])
    monkeypatch.setattr(scoring, "_START_SECONDS", 0.001)
    words = r"last_number can't be loaded in its process: took more than 0\.001 s to be imported$"
    with Scorer(RewardConfig(name="last_number")) as scorer, pytest.raises(RewardError, match=words):
        scorer.check([_rollout("7").prompt])


def test_closing_ends_a_reward_that_hangs(tmp_path: Path) -> None:
    started = tmp_path / "started"
    scorer = _faulty_scorer(seconds=600.0)
    scored = threading.Event()
    scorer.submit([(0, _rollout("", answer=f"touch {started}"))]).when_done(lambda pending: scored.set())
    _wait_for(started.exists)
    scorer.close()
    _wait_for(lambda: not _running(os.getpid()))
    assert scored.wait(60)  # with an error: whoever waits goes on


def test_a_process_that_was_killed_while_it_waited_is_replaced_and_no_response_pays_for_it() -> None:
    with Scorer(RewardConfig(name="faulty_reward:reward", max_failures=0), num_processes=1) as scorer:
        assert _rewards(scorer, _rollout("fine")) == [0.5]
        keeper, serving = sorted(map(int, _running(os.getpid())))
        os.kill(serving, signal.SIGKILL)
        os.waitid(os.P_PID, keeper, os.WEXITED | os.WNOWAIT)  # /proc forgets it before `poll` hears of its end
        assert _rewards(scorer, *[_rollout("fine")] * 2) == [0.5, 0.5]


DRIVER = """
import sys
from test_scoring import RewardConfig, Scorer, _rollout
cfg = RewardConfig(name=sys.argv[1], timeout_seconds=600.0)
Scorer(cfg, num_processes=1).score([_rollout("", answer=sys.argv[2])])
"""


def _driver(*arguments: str) -> subprocess.Popen[bytes]:
    path = [str(HERE), str(HERE.parent), str(HERE.parents[1])]
    return subprocess.Popen([sys.executable, "-c", f"import sys; sys.path[:0] = {path}\n{DRIVER}", *arguments])


def test_a_killed_driver_takes_a_reward_that_hangs_with_it(tmp_path: Path) -> None:
    started = tmp_path / "started"
    with _driver("faulty_reward:reward", f"touch {started}") as driver:
        _wait_for(started.exists)
        assert _running(driver.pid)
        driver.kill()
    _wait_for(lambda: not _running(driver.pid))


def test_a_killed_driver_takes_all_that_a_reward_has_started_with_it(tmp_path: Path) -> None:
    started = tmp_path / "pids"
    with _driver("faulty_reward:bomb", str(started)) as driver:
        _wait_for(lambda: started.exists() and len(started.read_text().splitlines()) == 64)
        driver.kill()
    _wait_for(lambda: not [pid for pid in started.read_text().split() if Path("/proc", pid).exists()])


def _running(driver: int) -> list[str]:
    """The processes of rewards that a driver has started; they name it in their command line."""
    processes = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if str(driver) in words and any(word.startswith("faulty_reward:") for word in words):
            processes.append(folder.name)
    return processes


def _state(pid: str) -> str:
    """What the kernel says of a process: T is stopped."""
    return Path("/proc", pid, "stat").read_text().rpartition(") ")[2][0]


def _wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
