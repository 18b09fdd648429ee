"""`astar launch` and `astar jobs` on a real Slurm, by sbatch and by nemo-run; stand_in.py stands in for Ray and astar.

nemo-run lives in an environment of its own: where a `nemorun` is on PATH, the Python beside it launches.
"""

import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from samples import LAUNCHED
from two_node_slurm import SECONDS, Slurm, two_node_slurm

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = Path(__file__).with_name("stand_in.py")
# Its suffix is Python for the stand-in: it prints how it was called. With seed 3 training ends with 3, with seed 4
# everything waits for a signal.
RUN = """
run_dir: runs/mine
model: {{path: m}}
reward: {{name: last_number}}
data:
  path: d
  suffix: |
    print(WORDS, CONFIG["data"].get("prompt_field"), flush=True)
    print(len(JOINED))
    if CONFIG.get("seed") == 3 and "train" in WORDS:
      exit(3)
    if CONFIG.get("seed") == 4:
      __import__("signal").pause()
slurm: {{nodes: 2, gpus_per_node: 0, backend: {backend}, env: ["ASTAR_PYTHON={python}"]}}
"""

type Astar = Callable[..., str]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with two_node_slurm(tmp_path_factory.mktemp("slurm")) as slurm:
        yield slurm


@pytest.fixture(params=["sbatch", "nemo-run"])
def astar(request: pytest.FixtureRequest, slurm: Slurm, tmp_path: Path) -> Astar:
    """Return a function that runs `astar ...` inside the cluster, in `tmp_path`, and gives what it prints."""
    python = sys.executable
    if request.param == "nemo-run":
        if (nemorun := shutil.which("nemorun")) is None:
            pytest.skip("no nemorun on PATH: pip install '.[launch]' in an environment of its own")
        python = str(Path(nemorun).parent / "python")
    (tmp_path / "run.yaml").write_text(RUN.format(backend=request.param, python=STAND_IN))
    (tmp_path / "m").mkdir()
    for file in ("d", *(f"m/{name}" for name in LAUNCHED)):
        (tmp_path / file).write_text("{}")
    environment = {"PYTHONPATH": str(ROOT), "NEMORUN_HOME": str(tmp_path / "nemo")}

    def run(*words: str) -> str:
        return slurm.run(python, "-m", "astar_megatron.cli", *words, cwd=tmp_path, env=environment)

    return run


def numbers(launched: str) -> list[str]:
    """The numbers of the jobs, as `astar launch` says them."""
    return [line.split()[1].rstrip(":") for line in launched.splitlines() if line.startswith("job ")]


def test_stages_run_in_their_order_each_on_the_nodes_it_needs(slurm: Slurm, astar: Astar) -> None:
    jobs = numbers(astar("launch", "--config", "run.yaml", "--set", "data.prompt_field='a  b'"))
    assert [slurm.wait(job) for job in jobs] == ["COMPLETED"] * 3
    ends, starts = ([slurm.fact(job, name) for job in jobs] for name in ("EndTime", "StartTime"))
    assert ends[0] <= starts[1] and ends[1] <= starts[2]
    logs = astar("jobs", "logs", "--config", "run.yaml").splitlines()
    called = [number for number, line in enumerate(logs) if line.startswith("['")]
    assert [logs[number].split("'")[1] for number in called] == ["sweep", "train", "eval"]
    assert [logs[number + 1] for number in called] == ["1", "2", "1"]  # nodes that had joined
    assert all(logs[number].endswith("] a  b") for number in called)
    status = astar("jobs", "status", "--config", "run.yaml")
    assert all(
        re.search(rf"{job} mine-\w+-{stage} COMPLETED", status)
        for job, stage in zip(jobs, ("sweep", "train", "eval"), strict=True)
    )
    assert [slurm.left_behind(job) for job in jobs] == [[], [], []]


def test_a_stage_that_waits_is_of_the_run_that_was_launched_although_the_file_is_edited(
    slurm: Slurm, astar: Astar, tmp_path: Path
) -> None:
    slurm.run("scontrol", "update", "NodeName=node1,node2", "State=DRAIN", "Reason=test")
    try:
        jobs = numbers(astar("launch", "--config", "run.yaml", "--stages", "sweep,train"))
        (tmp_path / "run.yaml").write_text((tmp_path / "run.yaml").read_text() + "seed: 3\n")
    finally:
        slurm.run("scontrol", "update", "NodeName=node1,node2", "State=RESUME")
    assert [slurm.wait(job) for job in jobs] == ["COMPLETED"] * 2  # with that seed training ends with 3


def test_what_comes_after_a_stage_that_failed_is_not_run(slurm: Slurm, astar: Astar) -> None:
    sweep, train, evaluation = numbers(astar("launch", "--config", "run.yaml", "--set", "seed=3"))
    assert [slurm.wait(job) for job in (sweep, train, evaluation)] == ["COMPLETED", "FAILED", "CANCELLED"]
    assert slurm.fact(train, "ExitCode") == "3:0"


def test_the_signal_before_the_time_limit_ends_the_program_and_requeues_the_job(slurm: Slurm, astar: Astar) -> None:
    (job,) = numbers(astar("launch", "--config", "run.yaml", "--stages", "sweep", "--set", "seed=4"))
    until = time.monotonic() + SECONDS
    while "['sweep'" not in astar("jobs", "logs", "--config", "run.yaml", "--set", "slurm.stages=[sweep]"):
        assert time.monotonic() < until
        time.sleep(0.2)
    slurm.run("scancel", "--signal=USR1", "--batch", job)
    while slurm.fact(job, "Restarts") != "1":
        assert time.monotonic() < until
        time.sleep(0.2)
    astar("jobs", "cancel", "--config", "run.yaml")
    assert slurm.wait(job) == "CANCELLED"
    assert slurm.left_behind(job) == []


def test_jobs_that_wait_and_run_are_cancelled(slurm: Slurm, astar: Astar) -> None:
    slurm.run("scontrol", "update", "NodeName=node2", "State=DRAIN", "Reason=test")
    try:
        sweep, train, evaluation = numbers(astar("launch", "--config", "run.yaml"))
        slurm.wait(sweep)
        until = time.monotonic() + SECONDS
        while slurm.fact(train, "Reason") == "Dependency":
            assert time.monotonic() < until
            time.sleep(0.2)
        assert slurm.fact(train, "JobState") == "PENDING"  # for want of a second node
        astar("jobs", "cancel", "--config", "run.yaml")
        assert [slurm.wait(job) for job in (train, evaluation)] == ["CANCELLED", "CANCELLED"]
    finally:
        slurm.run("scontrol", "update", "NodeName=node2", "State=RESUME")


def test_a_dry_run_prints_the_batch_script_and_changes_nothing(slurm: Slurm, astar: Astar, tmp_path: Path) -> None:
    before, files = slurm.run("squeue", "--states=all"), sorted(tmp_path.iterdir())
    out = astar("launch", "--config", "run.yaml", "--dry-run")
    assert len(re.findall(r"--job-name=mine-\w{8}-train", out)) == 1 and "afterok" in out and "start_nodes" in out
    assert sorted(tmp_path.iterdir()) == files
    assert slurm.run("squeue", "--states=all") == before


def test_runs_of_a_study_are_jobs_side_by_side_whose_ends_are_told(slurm: Slurm, tmp_path: Path) -> None:
    for name, end in (("fails", 3), ("ends", 0)):
        text = RUN.format(backend="sbatch", python=STAND_IN).replace("runs/mine", f"runs/{name}")
        (tmp_path / f"{name}.yaml").write_text(text.replace("print(len(JOINED))", f"exit({end})"))
    study = (
        "from pathlib import Path; from astar_megatron.config import load; from astar_megatron.launch import queue\n"
        "files = {name: Path(f'{name}.yaml') for name in ('fails', 'ends')}\n"
        "jobs = {n: queue.submission_of(load(f), 'train', f.with_suffix('.txt')) for n, f in files.items()}\n"
        "print(sorted(queue.ended(jobs, 0.5)))"
    )
    out = slurm.run(sys.executable, "-c", study, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    assert out.splitlines()[-1] == "[('ends', True), ('fails', False)]"
    assert "ended with status 3" in (tmp_path / "fails.txt").read_text()
    assert [slurm.left_behind(job) for job in numbers(out)] == [[], []]
