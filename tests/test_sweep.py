"""Stage 1 as jobs: killed anywhere, several at once, spending a budget. The engine is a fake; e2e/ has the real."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from samples import run_config
from sweep_jobs import CONTRACT, PROMPTS, answer, expected, rows, run, text

from astar_megatron.config import SweepConfig
from astar_megatron.data.allocation import samples_wanted, widest
from astar_megatron.data.v_star import VStarTable
from astar_megatron.sweep import score_again


@dataclass
class Job:
    """A process of the server's; only the server can ask how it ended."""

    pid: int
    ask: Callable[[Any], str]
    status: str = ""

    def ended(self) -> str:
        """Its exit status; empty while it runs."""
        self.status = self.status or self.ask(self.pid).removeprefix("running")
        return self.status

    def wait(self) -> str:
        until = time.monotonic() + 120
        while not (status := self.ended()) and time.monotonic() < until:
            time.sleep(0.01)
        return status

    def kill(self) -> bool:
        """Whether it was still running."""
        if self.ended():
            return False
        os.kill(self.pid, signal.SIGKILL)
        return self.wait() == "-9"


type Start = Callable[..., Job]


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    """Returns a function that starts `sweep_jobs.run` in a process of its own, forked from one that has imported."""
    root = Path(__file__).parents[1]
    command = [sys.executable, str(root / "tests/sweep_jobs.py")]
    env = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as server:
        assert server.stdin and server.stdout

        def ask(command: Any) -> str:
            assert server.stdin and server.stdout
            server.stdin.write(json.dumps(command) + "\n")
            server.stdin.flush()
            return server.stdout.readline().strip()

        def job(folder: Path, seconds: float, **settings: Any) -> Job:
            return Job(int(ask({"folder": str(folder), "seconds": seconds} | settings)), ask)

        yield job
        server.kill()  # its imports take seconds to leave


def finish(*jobs: Job) -> None:
    assert [job.wait() for job in jobs] == ["0"] * len(jobs)


def keys(folder: Path) -> list[tuple[str, int]]:
    return [(row["uid"], row["sample"]) for row in rows(folder)]


def test_ten_kills_anywhere_leave_the_rows_of_an_uninterrupted_sweep(tmp_path: Path, start: Start) -> None:
    finish(start(tmp_path / "whole", 0.0))
    chance, interrupted, shards = random.Random(6), 0, tmp_path / "killed" / "v_star"
    for _ in range(10):
        job = start(tmp_path / "killed", 0.02)
        enough = len(list(shards.glob("shard-*"))) + chance.randrange(2)
        while len(list(shards.glob("shard-*"))) < enough and not job.ended():
            time.sleep(0.001)
        time.sleep(chance.random() * 0.01)
        interrupted += job.kill()
    assert interrupted >= 6
    assert len(rows(tmp_path / "killed")) > 100  # what was appended before a kill stays
    finish(start(tmp_path / "killed", 0.0))
    assert set(keys(tmp_path / "killed")) == expected()
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")


def test_two_jobs_at_once_leave_no_duplicate_and_no_gap(tmp_path: Path, start: Start) -> None:
    finish(start(tmp_path, 0.005), start(tmp_path, 0.003))
    assert keys(tmp_path) == sorted(expected())  # each on disk once
    assert len({path.name.split("-")[2] for path in (tmp_path / "v_star").glob("shard-*")}) > 2
    assert not list((tmp_path / "v_star" / "leases").iterdir())


def test_a_job_ends_the_work_of_one_that_was_killed_beside_it(tmp_path: Path, start: Start) -> None:
    slow = start(tmp_path, 30.0)  # claims, and never answers
    leases: list[Path] = []
    while not leases or leases != (leases := list((tmp_path / "v_star").glob("leases/*.1"))):
        time.sleep(0.2)  # until it has claimed all that it takes at once
        leases = leases or list((tmp_path / "v_star").glob("leases/*.1"))
    quick = start(tmp_path, 0.0)
    until = time.monotonic() + 60
    while len(keys(tmp_path)) < len(expected()) - 4 * len(leases) and time.monotonic() < until:
        time.sleep(0.05)
    assert 0 < len(keys(tmp_path)) < len(expected())
    assert not quick.ended()  # it waits for the rest
    slow.kill()
    finish(quick)
    assert keys(tmp_path) == sorted(expected())


def test_samples_that_could_not_be_scored_are_drawn_once_count_as_their_prompt_s_lowest_and_are_scored_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "judge.py").write_text(
        "import os\ndef reward(response, answer):\n"
        f"    there = os.path.exists({str(tmp_path / 'there')!r})\n"
        "    return {'3': 0.5 if there else None, '2': -0.5}.get(response, 0.25)\n"
    )
    inputs = run(str(tmp_path), 0.0, num_prompts=40, reward="judge:reward")
    failures = (tmp_path / "reward_failures.jsonl").read_text().splitlines()
    failed = {(row["uid"], row["sample"]) for row in map(json.loads, failures)}
    assert 0 < len(failed) == len(failures)  # each was tried once
    assert keys(tmp_path) == sorted(expected(40))
    table = VStarTable.open(tmp_path / "v_star", CONTRACT)
    assert table.unscored() == failed
    estimates, rewards, summary = table.estimate(0.5, PROMPTS[:40], 4), table.rewards(), table.summary()
    for place, uid in enumerate(estimates.uids):
        known = [reward for sample, reward in enumerate(rewards[uid]) if (uid, sample) not in failed]
        assert {rewards[uid][sample] for of, sample in failed if of == uid} <= {min([0.0, *known])}
        assert estimates.mean[place] == pytest.approx(np.mean(rewards[uid]))
        assert estimates.success[place] == pytest.approx(np.mean(np.maximum(rewards[uid], 0)))
    assert summary.mean_reward == pytest.approx(np.mean(list(rewards.values())))
    assert dict(summary.rows())["not scored"].startswith(f"{len(failed)} samples, which count as the lowest")
    run(str(tmp_path), 0.0, num_prompts=40, reward="judge:reward")
    assert (tmp_path / "reward_failures.jsonl").read_text().splitlines() == failures  # nothing is drawn again
    cfg = run_config(run_dir=str(tmp_path), seed=1, reward={"name": "judge:reward"})
    drawn = set(table.responses())
    for there in (False, True):
        if there:
            (tmp_path / "there").touch()
        table = VStarTable.create_or_open(tmp_path / "v_star", CONTRACT)
        score_again(cfg, inputs, table, text)
        table = VStarTable.open(tmp_path / "v_star", CONTRACT)
        assert table.unscored() == (set() if there else failed)
    assert len(list(table.responses())) == len(drawn) + len(failed)
    assert set(table.responses()) == drawn  # seed and log-prob too are those of the drawing
    rewards = table.rewards()
    assert {rewards[uid][sample] for uid, sample in failed} == {0.5}


def test_extra_tokens_go_where_the_interval_is_wide_and_not_beyond_the_budget(tmp_path: Path, start: Start) -> None:
    finish(start(tmp_path, 0.0, num_prompts=60), start(tmp_path, 0.0, num_prompts=60))
    table = VStarTable.open(tmp_path / "v_star", CONTRACT)
    first = table.estimate(0.5, PROMPTS[:60])
    finish(*(start(tmp_path, 0.001, num_prompts=60, extra_tokens=600) for _ in range(2)))  # both come to one answer
    table = VStarTable.open(tmp_path / "v_star", CONTRACT)
    then = table.estimate(0.5, PROMPTS[:60])
    drawn_again = then.samples > 4
    assert 400 < then.tokens.sum() - first.tokens.sum() <= 600
    assert first.width[drawn_again].min() >= first.width[~drawn_again].max() - 1e-12
    assert set(then.samples.tolist()) <= {4, 8, 16, 32}
    assert keys(tmp_path) == sorted((uid, s) for uid, n in then.samples_by_uid().items() for s in range(n))
    cfg = SweepConfig(num_samples=4, extra_tokens=600)
    assert samples_wanted(table, PROMPTS[:60], cfg, 0.5).tolist() == then.samples.tolist()  # what training uses


def test_the_widest_that_fit_are_chosen() -> None:
    width, cost = np.array([0.2, 0.9, 0.9, 0.0, 0.5]), np.array([10, 30, 40, 1, 20])
    assert widest(width, cost, 90).tolist() == [False, True, True, False, True]
    assert widest(width, cost, 69).tolist() == [True, True, False, False, True]  # one too costly ends nothing
    assert widest(width, cost, 29).tolist() == [False, False, False, False, True]
    assert widest(width, cost, 9).tolist() == [False] * 5
    assert widest(width, cost, 1000).tolist() == [True, True, True, False, True]  # nothing is left to learn of the 4th


@pytest.mark.parametrize(
    ("partial", "other"),
    [
        pytest.param(0.0, 0.1, id="binary"),
        pytest.param(0.2, 0.1, id="other rewards from the second round on", marks=pytest.mark.slow),
        pytest.param(0.2, -1.0, id="rewards below 0 from the second round on"),
    ],
)
def test_heavy_tailed_lengths_spend_the_budget_and_exceed_it_by_one_round_at_most(
    tmp_path: Path, partial: float, other: float
) -> None:
    cfg, prompts, over = SweepConfig(num_samples=4, extra_tokens=4000), PROMPTS[:30], 0
    for seed in range(5):
        chance, table = random.Random(seed), VStarTable.create_or_open(tmp_path / str(seed), CONTRACT)
        spent, before = [], np.zeros(len(prompts), np.int64)
        while missing := table.missing(prompts, wanted := samples_wanted(table, prompts, cfg, 0.5)):
            assert (wanted >= before).all()
            before, new = wanted, []
            for prompt, n in missing:
                drawn = answer(prompt, n, n)
                reward = other if n >= 4 and chance.random() < partial else float(chance.random() < 0.3)
                tokens = min(1024, int(chance.lognormvariate(3, 1.5)) + 1)
                new.append(dataclasses.replace(drawn, reward=reward, token_ids=(0,) * tokens))
            table.append(new)
            reopened = VStarTable.open(tmp_path / str(seed), CONTRACT)
            assert samples_wanted(reopened, prompts, cfg, 0.5).tolist() == (
                samples_wanted(table, prompts, cfg, 0.5).tolist()
            )
            spent.append(sum(len(rollout.token_ids) for rollout in new))
        assert spent[1:] and sum(spent[1:-1]) < cfg.extra_tokens
        assert 0.3 * cfg.extra_tokens < sum(spent[1:]) < 1.3 * cfg.extra_tokens
        over += sum(spent[1:]) > cfg.extra_tokens
    assert over <= 2
