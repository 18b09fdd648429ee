"""Jobs side by side until each has ended, with a Slurm of scripts whose answers are written down beforehand."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from samples import run_config

from astar_megatron.cluster.placement import PlacementError
from astar_megatron.config import ConfigError, load
from astar_megatron.launch import queue
from astar_megatron.launch.queue import Submission, submission_of

# sbatch gives the numbers 7, 8, ...; squeue prints the next of its answers, or fails where it is SILENCE.
SILENCE = "slurm_load_jobs error: Unable to contact slurm controller"
STAND_IN = """#!{python}
import json, pathlib, sys
folder, name = pathlib.Path("{folder}"), pathlib.Path(sys.argv[0]).name
if name == "sbatch":
    calls = folder / "calls.jsonl"
    number = 7 + (len(calls.read_text().splitlines()) if calls.exists() else 0)
    with calls.open("a") as file:
        file.write(json.dumps(sys.argv[1:]) + "\\n")
    print(number)
else:
    answers = folder / "answers.json"
    first, *rest = json.loads(answers.read_text())
    answers.write_text(json.dumps(rest))
    if first.startswith("slurm_load_jobs error"):
        sys.exit(first)
    print(first, end="")
"""

type Slurm = Callable[..., None]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    """Return a function that says what squeue answers, call by call: each a table of numbers, names and states."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("sbatch", "squeue"):
        (tools / name).write_text(STAND_IN.format(python=sys.executable, folder=tools))
        (tools / name).chmod(0o700)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)

    def answers(*tables: str) -> None:
        names = {name: submission.job.name for name, submission in submissions().items()}
        texts = ["".join(line.format(**names) + "\n" for line in table.split("; ") if line) for table in tables]
        (tools / "answers.json").write_text(json.dumps(texts))

    return answers


def submissions(**slurm: Any) -> dict[str, Submission]:
    """The runs a and b, whose jobs are called so."""
    return {
        name: submission_of(
            run_config(run_dir=f"runs/{name}", slurm={"backend": "sbatch", "gpus_per_node": 1, **slurm}),
            "train",
            Path(f"runs/{name}/log.txt"),
        )
        for name in ("a", "b")
    }


def calls(tmp_path: Path) -> list[list[str]]:
    return [json.loads(line) for line in (tmp_path / "tools" / "calls.jsonl").read_text().splitlines()]


def test_each_is_submitted_at_once_and_told_when_it_ends_and_a_requeued_one_has_not_ended(
    slurm: Slurm, tmp_path: Path
) -> None:
    slurm(
        "",
        "7 {a} RUNNING; 8 {b} PENDING",
        "7 {a} COMPLETING; 8 {b} RUNNING",
        "7 {a} PENDING; 8 {b} FAILED",
        "7 {a} RUNNING",
        "7 {a} COMPLETED",
    )
    assert list(queue.ended(submissions(flags=["--exclusive"]), 0.0)) == [("b", False), ("a", True)]
    first, second = calls(tmp_path)
    assert [load(words[-1]).run_dir for words in (first, second)] == ["runs/a", "runs/b"]
    assert first[-1].startswith("runs/a/") and second[-1].startswith("runs/b/")
    assert "--exclusive" in first and "--output=runs/a/log.txt" in first and "--open-mode=append" in first


def test_a_job_that_waits_or_runs_is_taken_over_and_one_that_has_ended_is_submitted_anew(
    slurm: Slurm, tmp_path: Path
) -> None:
    slurm("3 {a} RUNNING; 4 {b} FAILED", "3 {a} COMPLETED; 4 {b} FAILED; 7 {b} COMPLETED")
    assert list(queue.ended(submissions(), 0.0)) == [("a", True), ("b", True)]
    assert [load(words[-1]).run_dir for words in calls(tmp_path)] == ["runs/b"]


def test_a_job_that_slurm_has_forgotten_did_not_do_well(slurm: Slurm) -> None:
    slurm("", "7 {a} COMPLETED")
    assert dict(queue.ended(submissions(), 0.0)) == {"a": True, "b": False}


def test_a_slurm_that_is_silent_for_a_while_is_asked_again(slurm: Slurm, capsys: pytest.CaptureFixture[str]) -> None:
    slurm("", *[SILENCE] * 39, "7 {a} COMPLETED; 8 {b} RUNNING", SILENCE, "7 {a} COMPLETED; 8 {b} COMPLETED")
    assert list(queue.ended(submissions(), 0.0)) == [("a", True), ("b", True)]
    assert capsys.readouterr().out.count("controller; the jobs go on, and Slurm is asked again every 0 s") == 2


def test_a_slurm_that_stays_silent_is_an_error_and_the_jobs_go_on(slurm: Slurm) -> None:
    slurm("", *[SILENCE] * 40)
    with pytest.raises(ConfigError, match="Unable to contact slurm controller; the jobs go on without this command"):
        list(queue.ended(submissions(), 0.0))


def test_what_could_not_be_submitted_is_refused_before(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    sbatch = {"backend": "sbatch", "gpus_per_node": 2}
    queue.check(run_config(slurm=sbatch), "train")
    with pytest.raises(ConfigError, match=r"slurm\.backend: nemo-run submits one run; for many take sbatch or local"):
        queue.check(run_config(slurm={"backend": "nemo-run"}), "train")
    for name in ("50%", "a\\b"):
        with pytest.raises(ConfigError, match=r"logs would go there, and sbatch takes .* choose another folder for"):
            queue.check(run_config(slurm=sbatch, run_dir=f"{name}/run"), "train")
    with pytest.raises(PlacementError, match="at least 4 shared"):
        queue.check(run_config(slurm=sbatch, parallel={"data": 4}), "train")
    monkeypatch.setenv("ASTAR_PORT", "7000")
    with pytest.raises(ConfigError, match="ASTAR_PORT: exported in this shell"):
        queue.check(run_config(slurm=sbatch), "train")
