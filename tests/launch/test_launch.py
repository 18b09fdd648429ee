"""`astar launch` and `astar jobs` with a Slurm of scripts: what is submitted, and what is refused before it is."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
# Stands in for sbatch, squeue and scancel: it writes down how it was called, and prints the number of the job.
STAND_IN = """#!{python}
import json, os, pathlib, sys
calls = pathlib.Path("{folder}/calls.jsonl")
number = 70 + (len(calls.read_text().splitlines()) if calls.exists() else 0)
settings = {{name: value for name, value in os.environ.items() if name.startswith("ASTAR_")}}
with calls.open("a") as file:
    file.write(json.dumps([pathlib.Path(sys.argv[0]).name, *sys.argv[1:], settings]) + "\\n")
print(number)
"""
SMALL = """
run_dir: runs/my run
model: {path: some/model}
data: {path: some.jsonl}
reward: {name: last_number}
"""

type Astar = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of these tests: a configuration, and a Slurm that writes down what it is asked."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("sbatch", "squeue", "scancel"):
        (tools / name).write_text(STAND_IN.format(python=sys.executable, folder=tools))
        (tools / name).chmod(0o700)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.delenv("NEMORUN_HOME", raising=False)
    work = tmp_path / "work"
    work.mkdir()
    (work / "run.yaml").write_text(SMALL)
    monkeypatch.chdir(work)
    return work


def calls(folder: Path) -> list[list[str]]:
    """The calls of the Slurm, each with its words; the last is the environment, as JSON."""
    file = folder.parent / "tools" / "calls.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [[*words, json.dumps(settings)] for *words, settings in map(json.loads, lines)]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_is_accepted(path: Path, folder: Path, astar: Astar) -> None:
    status, out, error = astar("launch", "--dry-run", "--config", path)
    assert (status, error) == (0, "")
    assert [f"--job-name={path.stem}-{stage} " in out for stage in ("sweep", "train", "eval", "export")] == [
        *(True, True, True, False)
    ]
    assert sorted(path.name for path in folder.iterdir()) == ["run.yaml"] and not calls(folder)


def test_a_stage_begins_when_the_one_before_it_has_succeeded(folder: Path, astar: Astar) -> None:
    status, out, _ = astar("launch", "--config", "run.yaml", "--set", "optim.lr=1e-5", "--set", "slurm.time=60")
    assert status == 0
    assert [json.loads(call[-1])["ASTAR_PROGRAM"] for call in calls(folder)] == ["sweep", "train", "eval"]
    after = [[word for word in call if "dependency" in word or "invalid-dep" in word] for call in calls(folder)]
    assert after == [
        [],
        ["--dependency=afterok:70", "--kill-on-invalid-dep=yes"],
        ["--dependency=afterok:71", "--kill-on-invalid-dep=yes"],
    ]
    for call in calls(folder):
        assert call[-5:-1] == [str(ROOT / "slurm" / "train.sbatch"), "run.yaml", "--set", "optim.lr=1e-5"]
        assert "--time=60" in call
    assert out.splitlines()[1] == "job 71: my_run-train on 1 node; logs/my_run-train-71.log"
    assert (folder / "logs").is_dir()  # Slurm does not make it


def test_the_section_says_all_that_flags_can(folder: Path, astar: Astar) -> None:
    image = folder / "image.sqsh"
    image.touch()
    (folder / "run.yaml").write_text(
        f"""{SMALL}
parallel: {{data: 8}}
rollout: {{num_engines: 8}}
slurm:
  stages: [export, train]
  nodes: 2
  gpus_per_node: 8
  account: me
  partition: big
  flags: [--exclusive, --qos=high]
  image: {image}
  mounts: ["/data:/data", "/models:/models"]
  setup: module load gcc
  env: [ASTAR_PYTHON=/opt/python, ASTAR_LOGS=logs/of a day]
"""
    )
    assert astar("launch", "--config", "run.yaml")[0] == 0
    train, export = calls(folder)
    assert train[1:-3] == [
        *("--parsable", "--job-name=my_run-train", "--nodes=2", "--gpus-per-node=8", "--account=me"),
        *("--partition=big", "--output=logs/of a day/%x-%j.log", "--exclusive", "--qos=high"),
    ]
    assert json.loads(train[-1]) == {
        "ASTAR_PROGRAM": "train",
        "ASTAR_IMAGE": str(image),
        "ASTAR_MOUNTS": "/data:/data,/models:/models",
        "ASTAR_SETUP": "module load gcc",
        "ASTAR_PYTHON": "/opt/python",
        "ASTAR_LOGS": "logs/of a day/my_run-train",
    }
    assert "--nodes=1" in export and not [word for word in export if word.startswith("--gpus")]


def test_flags_win_over_the_section(folder: Path, astar: Astar) -> None:
    words = ["--backend", "sbatch", "--nodes", "2", "--gpus-per-node", "1", "--stages", "train"]
    assert astar("launch", "--config", "run.yaml", *words, "--set", "slurm.nodes=5")[0] == 0
    ((*words, _),) = calls(folder)
    assert "--nodes=2" in words and "--gpus-per-node=1" in words and words[-1] == "run.yaml"


def test_only_training_gets_the_nodes_that_it_alone_needs(folder: Path, astar: Astar) -> None:
    sizes = ["--nodes", "3", "--gpus-per-node", "2", "--set", "parallel.data=4", "--set", "rollout.num_engines=2"]
    assert astar("launch", "--config", "run.yaml", *sizes)[0] == 0
    assert [next(word for word in call if word.startswith("--nodes")) for call in calls(folder)] == [
        *("--nodes=1", "--nodes=3", "--nodes=1")
    ]


def test_a_method_that_reads_no_table_has_no_sweep(folder: Path, astar: Astar) -> None:
    for setting, stages in (("filter.wide=1", ["train", "eval"]), ("filter.all_wrong=0", ["sweep", "train", "eval"])):
        out = astar("launch", "--dry-run", "--config", "run.yaml", "--set", "objective.name=grpo", "--set", setting)[1]
        assert [line.split()[0] for line in out.splitlines()] == [f"ASTAR_PROGRAM={stage}" for stage in stages]


# --- what a user can get wrong


def test_what_is_wrong_is_one_message_and_nothing_is_submitted(folder: Path, astar: Astar) -> None:
    (folder / "file").touch()
    for words, message in [
        ("--config nowhere.yaml", "nowhere.yaml: no such configuration file"),
        ("--backend kubernetes", "slurm.backend: input should be 'sbatch', 'nemo-run' or 'local', got 'kubernetes'"),
        ("--stages train,deploy", "slurm.stages.1: input should be 'sweep', 'train', 'eval' or 'export', got 'deploy'"),
        ("--nodes 0", "slurm.nodes: input should be greater than or equal to 1, got 0"),
        ("--gpus-per-node 0 --set model.fp8=mxfp8", "slurm.gpus_per_node: 0, but model.fp8=mxfp8 is for GPUs"),
        ("--gpus-per-node 0 --set cluster.share_gpus=true", "slurm.gpus_per_node: 0, but cluster.share_gpus=true is"),
        ("--gpus-per-node 0 --set rollout.graphs=decode", "slurm.gpus_per_node: 0, but rollout.graphs=decode is for"),
        ("--gpus-per-node 4 --set parallel.tensor=8", "parallel.tensor=8: a tensor-parallel group stays inside a node"),
        ("--set parallel.data=32", "32 ranks, 1 engine of 1 worker take 1"),
        ("--nodes 4 --set parallel.data=8", "slurm.nodes: 4, of which 2 would have nothing to do: 8 policy ranks and"),
        ("--set slurm.env=[ASTAR_LOGS=file/logs]", "file/logs: can't write logs there: Not a directory"),
        ("--set slurm.image=./none.sqsh", "slurm.image: ./none.sqsh: no such file"),
        ("--set slurm.ssh=me@host:/jobs", "slurm.ssh: me@host:/jobs, which only nemo-run knows"),
        ("--set slurm.packager=git", "slurm.packager: git, which only nemo-run knows"),
        ("--set slurm.ssh=host --backend nemo-run", "slurm.ssh: expected user@host:/folder, got 'host'"),
        ("--set slurm.env=[a=b]", "slurm.env: expected NAME=value with NAME in capitals, got 'a=b'"),
        ("--backend nemo-run", "NEMORUN_HOME: not set; jobs read and write below it: set it to a folder"),
        ("--backend nemo-run --set slurm.packager=git", "slurm.packager: git ships what is committed, and run.yaml is"),
    ]:
        words = words.split()
        if "nowhere.yaml" not in words:
            words += ["--config", "run.yaml"]
        status, out, error = astar("launch", *words)
        assert (status, out, calls(folder)) == (2, "", []), words
        assert error.startswith("astar: ") and message in error and "Traceback" not in error, (words, error)


def test_without_slurm_or_nemo_run_the_message_says_what_to_do(
    folder: Path, astar: Astar, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nemo_run", None)
    monkeypatch.setenv("NEMORUN_HOME", str(folder / "nemo"))
    monkeypatch.setenv("PATH", "/nowhere")
    for backend, message in (
        ("sbatch", "slurm.backend: sbatch is not here; run this on a login node, or set slurm.backend=local"),
        ("nemo-run", "slurm.backend: nemo-run needs nemo_run, which is not installed: pip install "),
    ):
        status, _, error = astar("launch", "--config", "run.yaml", "--backend", backend)
        assert status == 2 and error.startswith(f"astar: {message}")
    assert "squeue: not here" in astar("jobs", "status", "--config", "run.yaml")[2]


def test_what_slurm_refuses_is_its_own_words_and_no_later_stage_is_submitted(folder: Path, astar: Astar) -> None:
    sbatch = folder.parent / "tools" / "sbatch"
    sbatch.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: big' >&2\nexit 1\n")
    status, out, error = astar("launch", "--config", "run.yaml", "--set", "slurm.partition=big")
    assert (status, out) == (2, "") and "invalid partition specified: big" in error and error.count("afterok") == 0


# --- the jobs of a run


def test_jobs_are_asked_for_and_cancelled_by_their_names(folder: Path, astar: Astar) -> None:
    assert astar("jobs", "status", "--config", "run.yaml")[0] == 0
    assert astar("jobs", "cancel", "--config", "run.yaml")[0] == 0
    asked, *cancelled = calls(folder)
    assert asked[0] == "squeue" and "--name=my_run-sweep,my_run-train,my_run-eval" in asked
    assert [call[2] for call in cancelled] == [f"--name=my_run-{stage}" for stage in ("sweep", "train", "eval")]
    assert "expected status, logs or cancel" in astar("jobs", "stop", "--config", "run.yaml")[2]
    assert "there are no jobs" in astar("jobs", "status", "--config", "run.yaml", "--set", "slurm.backend=local")[2]


def test_logs_are_the_ends_of_the_newest_of_each_stage(folder: Path, astar: Astar) -> None:
    for number, moment in (("70", 1.0), ("71", 2.0)):
        driver = folder / "logs" / f"slurm-{number}" / "driver-node1-0.log"
        driver.parent.mkdir(parents=True)
        driver.write_text(f"step 1 of job {number}\n")
        own = folder / "logs" / f"my_run-train-{number}.log"
        own.write_text("".join(f"line {line} of job {number}\n" for line in range(100)))
        os.utime(own, (moment, moment))
    lines = astar("jobs", "logs", "--config", "run.yaml")[1].splitlines()
    assert lines[0] == "my_run-sweep: no log in logs yet"
    assert lines[1:3] == ["--- logs/my_run-train-71.log", "line 60 of job 71"]
    assert lines[42:44] == ["--- logs/slurm-71/driver-node1-0.log", "step 1 of job 71"]


# --- this machine


def test_stages_run_here_one_after_the_other_until_one_fails(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    python = folder / "python"
    python.write_text('#!/bin/sh\nshift 2\necho "$@"\n[ "$1" != train ] || exit 7\n')
    python.chmod(0o700)
    words = ["--config", "run.yaml", "--backend", "local", "--set", f"slurm.env=[ASTAR_PYTHON={python}]"]
    command = [sys.executable, "-m", "astar_megatron.cli", "launch", *words, "--set", "data.suffix=' x'"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    done = subprocess.run(
        command, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 7
    assert done.stdout.splitlines() == [
        f"{stage} --config run.yaml --set data.suffix=' x'" for stage in ("sweep", "train")
    ]
    assert done.stderr == "my_run-train ended with status 7; what comes after it is not run\n"


# --- wherever it is installed


def test_scripts_are_where_a_wheel_puts_them(tmp_path: Path) -> None:
    """The layout that pyproject.toml asks of a wheel, with an import that takes nothing from the checkout."""
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    for package in wheel["packages"]:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    for source, destination in wheel["force-include"].items():
        shutil.copytree(ROOT / source, tmp_path / destination)
    program = (
        "from astar_megatron.launch import scripts\nprint(scripts.path('train.sbatch'))\nscripts.path('no.sbatch')"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env={}, capture_output=True, text=True)
    assert done.stdout == f"{tmp_path}/astar_megatron/slurm/train.sbatch\n"
    assert "FileNotFoundError: no.sbatch: not in " in done.stderr
