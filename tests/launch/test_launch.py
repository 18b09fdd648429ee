"""`astar launch` and `astar jobs` with a Slurm of scripts: what is submitted, and what is refused before it is."""

import contextlib
import importlib.util
import itertools
import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from samples import LAUNCHED, run_config

from astar_megatron.cluster.signals import PassedOn
from astar_megatron.config import ConfigError, load, without_gpus
from astar_megatron.launch import checks, sbatch, scripts, slurm
from astar_megatron.launch.copies import with_copy
from astar_megatron.launch.stages import jobs_of, title

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
if sys.argv[0].endswith("squeue"):
    queue = pathlib.Path("{folder}/queue")
    print(queue.read_text() if queue.exists() else "", end="")
else:
    print(number)
"""
SMALL = """
run_dir: runs/my run
model: {path: some/model}
data: {path: some.jsonl}
reward: {name: last_number}
sweep: {table: some/table}
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
    for file in ("some.jsonl", "some/table/header.json", *(f"some/model/{name}" for name in LAUNCHED)):
        (work / file).parent.mkdir(parents=True, exist_ok=True)
        (work / file).write_text("{}")
    monkeypatch.chdir(work)
    return work


def named(folder: Path, run_dir: str = "runs/my run") -> str:
    """What the names of the jobs of a run in `folder` begin with."""
    return title(run_config(run_dir=str(folder / run_dir)))


def calls(folder: Path) -> list[list[str]]:
    """The calls of the Slurm that change it, each with its words; the last is the environment, as JSON."""
    return [call for call in all_calls(folder) if call[0] != "squeue"]


def all_calls(folder: Path) -> list[list[str]]:
    file = folder.parent / "tools" / "calls.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [[*words, json.dumps(settings)] for *words, settings in map(json.loads, lines)]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_is_accepted(path: Path, folder: Path, astar: Astar) -> None:
    status, out, error = astar("launch", "--dry-run", "--config", path)
    assert (status, error) == (0, "")
    name = named(folder, f"runs/{path.stem}")
    assert [f"--job-name={name}-{stage} " in out for stage in ("sweep", "train", "eval", "export")] == [
        *(True, True, True, False)
    ]
    assert sorted(path.name for path in folder.iterdir()) == ["run.yaml", "some", "some.jsonl"] and not calls(folder)


def test_a_stage_begins_when_the_one_before_it_has_succeeded(folder: Path, astar: Astar) -> None:
    status, out, _ = astar("launch", "--config", "run.yaml", "--set", "optim.lr=1e-5", "--set", "slurm.time=60")
    assert status == 0
    assert [json.loads(call[-1])["ASTAR_PROGRAM"] for call in calls(folder)] == ["sweep", "train", "eval"]
    after = [[word for word in call if "dependency" in word or "invalid-dep" in word] for call in calls(folder)]
    assert after == [
        [],
        ["--dependency=afterok:71", "--kill-on-invalid-dep=yes"],
        ["--dependency=afterok:72", "--kill-on-invalid-dep=yes"],
    ]
    for call in calls(folder):
        *_, script, file, _ = call
        assert script == str(ROOT / "slurm" / "train.sbatch") and load(file).optim.lr == 1e-5 and "--time=60" in call
    assert out.splitlines()[1] == f"job 72: {named(folder)}-train on 1 node; logs/{named(folder)}-train-72.log"
    assert (folder / "logs").is_dir()  # Slurm does not make it


def test_jobs_get_the_python_that_launches_them_unless_a_container_has_its_own_or_it_can_not_train(
    folder: Path, astar: Astar, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert astar("launch", "--config", "run.yaml", "--stages", "train")[0] == 0
    assert json.loads(calls(folder)[-1][-1])["ASTAR_PYTHON"] == sys.executable
    for image in ("a/b:1", "$oauthtoken@nvcr.io#nvidia/pytorch:24.01-py3"):
        assert astar("launch", "--config", "run.yaml", "--stages", "train", "--set", f"slurm.image={image}")[0] == 0
    assert "ASTAR_PYTHON" not in json.loads(calls(folder)[-1][-1])
    monkeypatch.setitem(sys.modules, "vllm", None)  # as in nemo-run's environment, which has Ray
    assert astar("launch", "--config", "run.yaml", "--stages", "train")[0] == 0
    assert "ASTAR_PYTHON" not in json.loads(calls(folder)[-1][-1])


def test_a_run_that_would_draw_from_a_part_of_the_policy_is_not_submitted_but_its_evaluation_is(
    folder: Path, astar: Astar
) -> None:
    words = ("launch", "--config", "run.yaml", "--set", "sampling.top_p=0.9", "--stages")
    for stage in ("sweep", "train"):
        status, _, error = astar(*words, stage)
        assert status == 2 and "sampling.top_p: 0.9" in error and calls(folder) == []
    (folder / "runs/my run/hf").mkdir(parents=True)
    assert astar(*words, "eval")[0] == 0 and len(calls(folder)) == 1


def test_sbatch_is_that_of_the_launchers_path_whatever_the_jobs_get(folder: Path, astar: Astar) -> None:
    env = "slurm.env=['PATH=/opt/venv/bin:/bin', 'IMAGE=x.sqsh', 'PROGRAM=x']"  # of the user's own names
    status, _, error = astar("launch", "--config", "run.yaml", "--stages", "train", "--set", env)
    assert (status, error, len(calls(folder))) == (0, "", 1)


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
        *(
            "--parsable",
            "--export=ALL",
            f"--job-name={named(folder)}-train",
            "--nodes=2",
            "--gpus-per-node=8",
            "--account=me",
        ),
        *("--partition=big", "--output=logs/of a day/%x-%j.log", "--exclusive", "--qos=high"),
    ]
    assert json.loads(train[-1]) == {
        "ASTAR_PROGRAM": "train",
        "ASTAR_IMAGE": str(image),
        "ASTAR_MOUNTS": "/data:/data,/models:/models",
        "ASTAR_SETUP": "module load gcc",
        "ASTAR_PYTHON": "/opt/python",
        "ASTAR_LOGS": f"logs/of a day/{named(folder)}-train",
    }
    assert "--nodes=1" in export and not [word for word in export if word.startswith("--gpus")]


@pytest.mark.parametrize("flag", ["--gpus-per-node=h100:8", "--gres=gpu:1g.5gb:8", "--gres=none"])
def test_a_flag_that_asks_for_gpus_in_its_own_way_stands_in_place_of_the_key(
    folder: Path, astar: Astar, flag: str
) -> None:
    words = ["--stages", "train,export", "--set", f"slurm.flags=['{flag}', --exclusive]"]
    assert astar("launch", "--config", "run.yaml", *words)[0] == 0
    train, export = ([word for word in call if word.startswith(("--g", "--exclusive"))] for call in calls(folder))
    assert (train, export) == ([flag, "--exclusive"], ["--exclusive"])


def test_flags_for_other_things_leave_the_gpus_alone(folder: Path, astar: Astar) -> None:
    words = ["--config", "run.yaml", "--stages", "train,export", "--set"]
    assert astar("launch", *words, "slurm.flags=['--gres=lustre:1,nvme:2']")[0] == 0
    train, export = ([word for word in call if word.startswith("--g")] for call in calls(folder))
    assert (train, export) == (["--gpus-per-node=8", "--gres=lustre:1,nvme:2"], ["--gres=lustre:1,nvme:2"])


@pytest.mark.parametrize(
    ("flag", "others"),
    [
        ("--gres=gpu:a100:8,nvme:2", "--gres=nvme:2"),
        ("--gres=lustre,gres/gpu:8", "--gres=lustre"),
        ("--gres=gpu", None),
        ("--gres=none", None),
        ("--gpus-per-node=h100:8", None),
        ("--exclusive", "--exclusive"),
    ],
)
def test_a_stage_without_gpus_keeps_what_else_a_flag_asks_for(flag: str, others: str | None) -> None:
    assert without_gpus(flag) == others


def test_numbers_are_read_between_a_sites_own_lines(folder: Path, astar: Astar) -> None:
    tools, launch = folder.parent / "tools", ("launch", "--config", "run.yaml", "--stages", "train")
    (tools / "sbatch").write_text("#!/bin/sh\necho 'Welcome to 2026\n71;big\nYour account is fine'\n")
    assert astar(*launch)[1].startswith("job 71: ")
    (tools / "queue").write_text(f"Welcome to 2026\n70 {named(folder)}-train PENDING\n")
    assert f"slurm: job 70, {named(folder)}-train, is PENDING already" in astar(*launch)[2]
    (tools / "queue").unlink()
    (tools / "sbatch").write_text("#!/bin/sh\necho Welcome to 2026\n")
    status, _, error = astar(*launch)
    assert status == 2 and "no line that is the number of a job" in error and "'Welcome to 2026'" in error


def test_flags_win_over_the_section(folder: Path, astar: Astar) -> None:
    words = ["--backend", "sbatch", "--nodes", "2", "--gpus-per-node", "1", "--stages", "train"]
    assert astar("launch", "--config", "run.yaml", *words, "--set", "slurm.nodes=5")[0] == 0
    ((*words, _),) = calls(folder)
    assert "--nodes=2" in words and "--gpus-per-node=1" in words


# --- what a job reads


def test_a_job_reads_what_was_checked_whatever_becomes_of_the_file(folder: Path, astar: Astar) -> None:
    """Two launches of one file, whose first is still in the queue when the file, and its base, are edited."""
    (folder / "base.yaml").write_text(SMALL + "seed: 3\n")
    for run_dir, seed in (("runs/a", 3), ("runs/b", 4)):
        (folder / "run.yaml").write_text(f"base: base.yaml\nrun_dir: {run_dir}\n")
        (folder / "base.yaml").write_text(f"{SMALL}seed: {seed}\n")
        words = ["--stages", "train", "--set", "data.suffix=' \N{GRINNING FACE} # 1e-5'"]
        assert astar("launch", "--config", "run.yaml", *words)[0] == 0
    first, second = (load(call[-2]) for call in calls(folder))
    assert (first.run_dir, first.seed, second.run_dir, second.seed) == ("runs/a", 3, "runs/b", 4)
    assert first.data.suffix == " \N{GRINNING FACE} # 1e-5"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_copy_that_a_job_reads_is_the_same_run(path: Path, folder: Path) -> None:
    own = load(path, ["data.date=2026-11-28", f"slurm.env=['MINE={'x' * 9}']"])
    (job, *_) = jobs_of(own, str(path))
    file = Path(with_copy(job, own, folder).config_file)
    assert load(file).model_copy(update={"slurm": own.slurm}) == own
    assert "MINE" not in file.read_text()  # the section may have what is nobody else's


def test_a_copy_follows_the_umask_and_launches_of_other_content_do_not_share_it(folder: Path, astar: Astar) -> None:
    before = os.umask(0o077)
    try:
        for lr in ("1e-5", "1e-6", "1e-5"):
            assert astar("launch", "--config", "run.yaml", "--stages", "train", "--set", f"optim.lr={lr}")[0] == 0
    finally:
        os.umask(before)
    first, second, third = (Path(call[-2]) for call in calls(folder))
    assert first == third != second and first.stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in Path("logs").iterdir()) == sorted((first.name, second.name))


def test_a_container_sees_the_copy(folder: Path, astar: Astar) -> None:
    """Which is in the folder that train.sbatch mounts, where logs go elsewhere than below the folder of submission."""
    logs = folder.parent / "logs"
    words = ["--set", "slurm.image=a/b:1", "--set", f"slurm.env=[ASTAR_LOGS={logs}]"]
    assert astar("launch", "--config", "run.yaml", "--stages", "train", *words)[0] == 0
    ((*_, file, settings),) = calls(folder)
    assert Path(file).parent == Path(json.loads(settings)["ASTAR_LOGS"])


def test_a_time_limit_that_leaves_time_is_accepted(folder: Path, astar: Astar) -> None:
    for words in ("time=6", "time=1-0", "time=UNLIMITED", "time=0:5:1", "time=2 flags=[--signal=B:USR1@60]"):
        sets = [option for word in words.split() for option in ("--set", f"slurm.{word}")]
        assert astar("launch", "--dry-run", "--config", "run.yaml", *sets)[0] == 0, words


def test_only_training_gets_the_nodes_that_it_alone_needs(folder: Path, astar: Astar) -> None:
    sizes = ["--nodes", "3", "--gpus-per-node", "2", "--set", "parallel.data=4", "--set", "rollout.num_engines=2"]
    assert astar("launch", "--config", "run.yaml", *sizes)[0] == 0
    assert [next(word for word in call if word.startswith("--nodes")) for call in calls(folder)] == [
        *("--nodes=1", "--nodes=3", "--nodes=1")
    ]


def test_spare_nodes_come_on_top(folder: Path, astar: Astar) -> None:
    sizes = ["--nodes", "2", "--gpus-per-node", "1", "--set", "slurm.env=[ASTAR_SPARE_NODES=1]"]
    assert astar("launch", "--config", "run.yaml", "--stages", "train,export", *sizes)[0] == 0
    assert [next(word for word in call if word.startswith("--nodes")) for call in calls(folder)] == [
        *("--nodes=3", "--nodes=2")
    ]


def test_a_method_that_reads_no_table_has_no_sweep(folder: Path, astar: Astar) -> None:
    for setting, stages in (
        ("filter.max_width=0.5", ["train", "eval"]),
        ("filter.all_wrong=0", ["sweep", "train", "eval"]),
    ):
        out = astar("launch", "--dry-run", "--config", "run.yaml", "--set", "objective.name=grpo", "--set", setting)[1]
        _, *lines = out.partition("\n\n")[0].splitlines()
        commands = [line.split()[0] for line in lines]
        assert commands == [f"ASTAR_PROGRAM={stage}" for stage in stages]


def test_a_dry_run_prints_the_batch_script_and_the_file_that_would_be_read(folder: Path, astar: Astar) -> None:
    script = (ROOT / "slurm" / "train.sbatch").read_text()
    out = astar("launch", "--dry-run", "--config", "run.yaml", "--stages", "train")[1]
    assert out.endswith(f"which each of them runs:\n{script}")
    assert out.startswith("# Nothing is written. ") and not (folder / "logs").exists()
    assert astar("launch", "--config", "run.yaml", "--stages", "train")[0] == 0
    assert calls(folder)[0][-2] in out.splitlines()[1]


# --- astar train


@pytest.mark.parametrize("backend", ["sbatch", "nemo-run"])
def test_train_submits_as_launch_does_where_the_section_says_so(
    backend: str, folder: Path, astar: Astar, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "run.yaml").write_text(f"{SMALL}slurm: {{backend: {backend}}}\n")
    monkeypatch.setitem(sys.modules, "nemo_run", None)
    monkeypatch.setenv("NEMORUN_HOME", str(folder / "nemo"))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    status, out, error = astar("train", "--config", "run.yaml", "--set", "optim.lr=1e-5")
    assert out.startswith(
        f"slurm.backend={backend}: submitting, as `astar launch` does; slurm.backend=local trains here"
    )
    if backend == "nemo-run":
        assert "nemo-run needs nemo_run" in error
        return
    assert [json.loads(call[-1])["ASTAR_PROGRAM"] for call in calls(folder)] == ["sweep", "train", "eval"]
    assert status == 0 and all(load(call[-2]).optim.lr == 1e-5 for call in calls(folder))
    refusal = astar("train", "--supervise", "--config", "run.yaml")[2]
    assert refusal.startswith("astar: --supervise: with slurm.backend=sbatch the job's script starts it again")


def test_train_runs_in_a_job_and_wherever_the_section_does_not_submit(
    folder: Path, astar: Astar, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "run.yaml").write_text(f"{SMALL}slurm: {{backend: sbatch}}\n")
    shutil.rmtree(folder / "some")
    for words, job in (((), "7"), (("--set", "slurm.backend=local"), ""), (("--set", "slurm.backend=null"), "")):
        monkeypatch.setenv("SLURM_JOB_ID", job) if job else monkeypatch.delenv("SLURM_JOB_ID", raising=False)
        status, _, error = astar("train", "--config", "run.yaml", *words)
        assert status == 2 and error.startswith(
            "astar: model.path: some/model is no model folder"
        )  # what training says of that
    assert calls(folder) == []
    assert all("backend" not in path.read_text() for path in CONFIGS)


# --- what a user can get wrong


def test_what_is_wrong_is_one_message_and_nothing_is_submitted(folder: Path, astar: Astar) -> None:
    (folder / "file").touch()
    for words, message in [
        ("--config nowhere.yaml", "nowhere.yaml: no such configuration file"),
        ("--set slurm.time=soon", "slurm.time: expected minutes, as 60, or days-hours:minutes:seconds, got 'soon'"),
        ("--set slurm.time=5", "slurm.time: 5 is 300 s, and 300 s before the limit jobs are asked to"),
        ("--set slurm.time=4:59", "slurm.time: 4:59 is 299 s, and 300 s"),
        ("--set slurm.time=1:0:0 --set slurm.flags=[--signal=B:USR1@3600]", "1:0:0 is 3600 s, and 3600 s before"),
        ("--set slurm.time=0-0:5", "slurm.time: 0-0:5 is 300 s, and 300 s"),
        ("--set slurm.flags=[--time=0-0:5]", "slurm.flags: --time=0-0:5: set slurm.time"),
        ("--set slurm.flags=[--dependency=singleton]", "slurm.flags: --dependency=singleton: leave it out: launching"),
        ("--set slurm.flags=[--signal=B:USR1@x]", "--signal=B:USR1@x: the batch script waits for --signal=B:USR1@<"),
        ("--set slurm.flags=[--gpus-per-node=8]", "slurm.flags: --gpus-per-node=8: set slurm.gpus_per_node"),
        ("--set slurm.flags=[--gpus=8]", "slurm.flags: --gpus=8: set slurm.gpus_per_node"),
        ("--set slurm.flags=[--gpus-per-task=8]", "slurm.flags: --gpus-per-task=8: set slurm.gpus_per_node"),
        ("--set slurm.flags=[--het-group=1]", "slurm.flags: --het-group=1: leave it out: launching"),
        ("--set slurm.flags=[--gres=gpu:8,--gres=nvme:1]", "slurm.flags: --gres stands twice, of which one would be"),
        ("--set slurm.env=[A=1,A=2]", "slurm.env: A stands twice, of which one would be lost; make it one"),
        (
            "--set slurm.env=[ASTAR_LOGS=~/logs]",
            "slurm.env: ASTAR_LOGS=~/logs: no shell reads it, which alone",
        ),
        ("--set slurm.env=[ASTAR_PYTHON=~/x]", "slurm.env: ASTAR_PYTHON=~/x: no shell reads it"),
        ("--set slurm.env=[ASTAR_LOGS=$SCRATCH/logs]", "slurm.env: ASTAR_LOGS=$SCRATCH/logs: no shell reads it"),
        ("--set slurm.env=[ASTAR_LOGS=a%b]", "/a%b: logs would go there, and sbatch takes % for one of its own"),
        ("--set slurm.image=a/b:1 --set slurm.mounts=['$DATA:/data']", "slurm.mounts.0: a text without variables of a"),
        (
            "--set slurm.flags=[--gpus-per-node=h100:4]",
            "slurm.flags: --gpus-per-node=h100:4, but slurm.gpus_per_node=8, by which the run is planned",
        ),
        ("--set slurm.flags=['--gres=gpu:a100:2,nvme:8']", "--gres=gpu:a100:2,nvme:8, but slurm.gpus_per_node=8"),
        ("--set slurm.flags=['--gres=gres/gpu:2']", "--gres=gres/gpu:2, but slurm.gpus_per_node=8"),
        ("--backend kubernetes", "slurm.backend: input should be 'sbatch', 'nemo-run' or 'local', got 'kubernetes'"),
        ("--stages train,deploy", "slurm.stages.1: input should be 'sweep', 'train', 'eval' or 'export', got 'deploy'"),
        ("--nodes 0", "slurm.nodes: input should be greater than or equal to 1, got 0"),
        ("--gpus-per-node 0 --set model.fp8=mxfp8", "slurm.gpus_per_node: 0, but model.fp8=mxfp8 is for GPUs"),
        ("--gpus-per-node 0 --set cluster.share_gpus=true", "slurm.gpus_per_node: 0, but cluster.share_gpus=true is"),
        ("--gpus-per-node 0 --set rollout.graphs=decode", "slurm.gpus_per_node: 0, but rollout.graphs=decode is for"),
        ("--gpus-per-node 4 --set parallel.tensor=8", "parallel.tensor=8: a tensor-parallel group stays inside a node"),
        ("--set rollout.max_staleness=1 --set cluster.share_gpus=true", "rollout.max_staleness: 1, but engines that"),
        ("--set parallel.data=32", "32 ranks, 1 engine of 1 worker take 1"),
        ("--nodes 4 --set parallel.data=8", "slurm.nodes: 4, of which 2 would have nothing to do: 8 policy ranks and"),
        ("--set slurm.env=[ASTAR_LOGS=file/logs]", "file/logs: can't write logs there: Not a directory"),
        ("--set slurm.image=./none.sqsh", "slurm.image: ./none.sqsh: no such file"),
        ("--set slurm.image=a/b:1 --backend local", "slurm.image: a/b:1, but local has no containers"),
        ("--set slurm.mounts=[/data:/data]", "slurm.mounts: /data:/data, but no container would see it"),
        ("--set run_dir=some.jsonl/runs", "run_dir: some.jsonl/runs: {folder}/some.jsonl is no folder that you may"),
        ("--set sweep.table=some.jsonl/v", "sweep.table: some.jsonl/v: {folder}/some.jsonl is no folder that you may"),
        ("--set data.path=/nope.jsonl", "data.path: /nope.jsonl is not here; name what is"),
        ("--set data.eval_path=nope.jsonl", "data.eval_path: nope.jsonl is not here"),
        ("--set eval.benchmarks=[amc23] --set eval.folder=/nope", "eval.folder: /nope is not here"),
        ("--set model.path=some", "model.path: some/config.json is not here"),
        ("--set model.path=/no/model --stages eval", "model.path: /no/model/config.json is not here"),
        ("--set model.path=/no/model --backend local", "model.path: /no/model/config.json is not here"),
        (
            "--stages train --set sweep.table=none",
            "slurm.stages: train without sweep, and none is no V* table; add sweep",
        ),
        ("--stages eval", "slurm.stages: eval without train, and runs/my run/hf is not there; add train"),
        ("--stages export", "slurm.stages: export without train, and runs/my run is not there; add train"),
        ("--stages=", "slurm.stages: list should have at least 1 item"),
        ("--set slurm.stages=[]", "slurm.stages: list should have at least 1 item"),
        ("--set slurm.env=[ASTAR_LOGS=]", "slurm.env: ASTAR_LOGS=: empty; leave it out for its default"),
        ("--set slurm.flags=[--clusters=b]", "slurm.flags: --clusters=b: leave it out: launching"),
        ("--set slurm.flags=[--arr=0-3]", "slurm.flags: --arr=0-3: sbatch takes it for --array; write flags in full"),
        ("--set slurm.flags=[--depend=afterok:1]", "--depend=afterok:1: sbatch takes it for --dependency"),
        ("--set slurm.flags=[--sig=B:TERM@60]", "--sig=B:TERM@60: sbatch takes it for --signal"),
        ("--set slurm.flags=[--exp=NONE]", "--exp=NONE: sbatch takes it for --export"),
        ("--set slurm.packager=no/*.py --backend nemo-run", "slurm.packager: no file here matches no/*.py; name a"),
        ("--set slurm.ssh=me@host:/jobs", "slurm.ssh: me@host:/jobs, which only nemo-run knows"),
        ("--set slurm.packager=git", "slurm.packager: git, which only nemo-run knows"),
        ("--set slurm.ssh=host --backend nemo-run", "slurm.ssh: expected user@host:/folder of letters, digits and"),
        ("--set slurm.env=[a=b]", "slurm.env: expected NAME=value with NAME in capitals, got 'a=b'"),
        ("--set slurm.env=[ASTAR_SPARE_NODES=few]", "slurm.env: ASTAR_SPARE_NODES=few: expected a whole number from 0"),
        (
            "--set slurm.env=[ASTAR_SPARE_NODE=1]",
            "slurm.env: ASTAR_SPARE_NODE: no such variable of the batch",
        ),
        (
            "--set slurm.env=[ASTAR_PYTHONN=x]",
            "no such variable of the batch script; the nearest is ASTAR_PYTHON",
        ),
        ("--set slurm.env=[ASTAR_ADDRESS=x:1]", "slurm.env: ASTAR_ADDRESS: no such variable"),
        ("--set slurm.env=[ASTAR_PREFLIGHT=no]", "ASTAR_PREFLIGHT=no: expected a whole number from 0 to 1"),
        (
            "--set slurm.env=[SBATCH_ARRAY_INX=0-3]",
            "SBATCH_ARRAY_INX=0-3: an option of sbatch's own; say it in",
        ),
        ("--set slurm.flags=[--time-min=1]", "slurm.flags: --time-min: 1 is 60 s, and 300 s before the limit"),
        ("--set slurm.flags=[--time-mi=1]", "--time-mi=1: sbatch takes it for --time-min"),
        ("--set slurm.flags=[--time-min=soon]", "--time-min=soon: expected minutes, as 60, or days-hours"),
        ("--set slurm.env=[ASTAR_PORT=65535]", "ASTAR_PORT=65535: expected a whole number from 1024 to 65472"),
        ("--set slurm.env=[ASTAR_PORT=08192]", "ASTAR_PORT=08192: expected a whole number from 1024 to 65472"),
        ("--set slurm.env=[ASTAR_IMAGE=/no.sqsh]", "slurm.env: ASTAR_IMAGE=/no.sqsh: slurm.image sets that variable"),
        ("--set slurm.env=[ASTAR_PROGRAM=eval]", "slurm.env: ASTAR_PROGRAM=eval: slurm.stages sets that variable"),
        ("--set slurm.flags=['-C=gpu']", "slurm.flags: expected a long flag, as --exclusive or --constraint=gpu, got"),
        ("--set slurm.flags=[--export=NONE]", "slurm.flags: --export=NONE: jobs get the whole environment"),
        ("--backend nemo-run", "NEMORUN_HOME: not set; jobs read and write below it: set it to a folder"),
        ("--backend nemo-run --dry-run", "NEMORUN_HOME: not set"),
        ("--backend nemo-run --set slurm.packager=git", "slurm.packager: git ships what is committed, and run.yaml is"),
    ]:
        words = words.split()
        if "nowhere.yaml" not in words:
            words += ["--config", "run.yaml"]
        status, out, error = astar("launch", *words)
        assert (status, out, calls(folder)) == (2, "", []), words
        message = message.replace("{folder}", str(folder))
        assert error.startswith("astar: ") and message in error and "Traceback" not in error, (words, error)


def test_a_model_whose_copy_did_not_end_is_refused(folder: Path, astar: Astar) -> None:
    model = folder / "some/model"
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    for files, message in (
        ({"model.safetensors": None}, "some/model has neither model.safetensors nor model.safetensors.index.json"),
        ({"model.safetensors": ""}, "some/model/model.safetensors is empty: copy the file again"),
        ({"tokenizer.json": ""}, "some/model/tokenizer.json is empty: copy the file again"),
        ({"tokenizer.json": None, "tokenizer_config.json": "{}"}, "some/model has no tokenizer: add tokenizer.json"),
        (
            {"model.safetensors": None, "model.safetensors.index.json": index, "model-1.safetensors": "1"},
            "some/model/model.safetensors.index.json names model-2.safetensors, which is missing: copy it there",
        ),
    ):
        shutil.copytree(model, folder / "whole")
        for name, text in files.items():
            (model / name).unlink() if text is None else (model / name).write_text(text)
        for backend in ("sbatch", "local"):
            status, out, error = astar("launch", "--config", "run.yaml", "--backend", backend)
            assert (status, out, calls(folder)) == (2, "", []) and f"astar: model.path: {message}" in error, error
        shutil.rmtree(model)
        (folder / "whole").rename(model)
    (model / "tokenizer.json").rename(model / "spiece.model")  # another library's
    assert astar("launch", "--config", "run.yaml")[0] == 0


def test_that_jobs_take_the_nodes_own_python_is_told(
    folder: Path, astar: Astar, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("launch", "--config", "run.yaml", "--dry-run")
    assert astar(*words)[2] == ""  # this one has torch
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    status, _, error = astar(*words)
    assert status == 0 and error.startswith("astar: jobs run the python3 of their nodes") and error.count("\n") == 1
    for more in ("slurm.setup=module load x", "slurm.env=[ASTAR_PYTHON=/opt/python]", "slurm.image=a/b:1"):
        assert astar(*words, "--set", more)[2] == ""
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/python").touch()
    assert astar(*words)[2] == ""


def test_what_is_exported_in_the_shell_does_not_reach_jobs_past_the_checks(
    folder: Path, astar: Astar, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ASTAR_IMAGE", "ASTAR_LOGS", "ASTAR_SPARE_NODES"):
        monkeypatch.setenv(name, "1")
        for backend in ("sbatch", "nemo-run", "local"):
            status, _, error = astar("launch", "--config", "run.yaml", "--backend", backend)
            assert status == 2 and error.startswith(f"astar: {name}: exported in this shell"), error
        monkeypatch.delenv(name)
    assert calls(folder) == []


def test_a_cluster_that_only_sbatch_would_be_told_of_is_refused(
    folder: Path, astar: Astar, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_CLUSTERS", "b")
    status, _, error = astar("launch", "--config", "run.yaml")
    assert (status, calls(folder)) == (2, []) and error.startswith("astar: SBATCH_CLUSTERS: only sbatch reads it")


def test_a_time_limit_of_the_shells_is_checked_where_it_counts(
    folder: Path, astar: Astar, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_TIMELIMIT", "4")
    status, _, error = astar("launch", "--config", "run.yaml")
    assert (status, calls(folder)) == (2, []) and error.startswith("astar: SBATCH_TIMELIMIT: 4 is 240 s, and 300 s")
    assert astar("launch", "--config", "run.yaml", "--set", "slurm.time=60")[0] == 0


def test_the_current_folder_is_one_that_slurm_and_a_container_can_take(
    folder: Path, astar: Astar, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, words, message in (
        ("50%", (), "50%/logs: logs would go there, and sbatch takes %"),
        ("a\\b", (), "a\\b/logs: logs would go there, and sbatch takes \\"),
        ("a:b", ("--set", "slurm.image=a/b:1"), "a:b, with , or :, can't be mounted; launch from another folder"),
    ):
        shutil.copytree(folder, folder.parent / name)
        monkeypatch.chdir(folder.parent / name)
        status, _, error = astar("launch", "--config", "run.yaml", *words)
        assert (status, calls(folder)) == (2, []) and message in error


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


def test_what_slurm_refuses_is_its_own_words_and_nothing_stays_submitted(folder: Path, astar: Astar) -> None:
    sbatch = folder.parent / "tools" / "sbatch"
    refusing = "case $* in *my_run-*-eval*) echo 'sbatch: error: invalid account' >&2; exit 1;; esac\n"
    shutil.move(sbatch, sbatch.with_name("accept"))
    sbatch.write_text(f'#!/bin/sh\n{refusing}exec {sbatch.with_name("accept")} "$@"\n')
    sbatch.chmod(0o700)
    status, out, error = astar("launch", "--config", "run.yaml")
    assert (status, out) == (2, "") and error.endswith("sbatch: error: invalid account\n")
    assert [call[0] for call in calls(folder)] == ["accept", "accept"]  # squeue, asked for their names, knew of none


def test_jobs_that_could_not_be_cancelled_are_named(folder: Path, astar: Astar) -> None:
    tools = folder.parent / "tools"
    fails = f"case $* in *my_run-*-eval*) touch {tools}/down; exit 1;; *-train*) echo 72;; *) echo 71;; esac"
    (tools / "sbatch").write_text(f"#!/bin/sh\n{fails}\n")
    (tools / "squeue").write_text(f"#!/bin/sh\n[ ! -e {tools}/down ] || {{ echo no answer >&2; exit 1; }}\n")
    status, _, error = astar("launch", "--config", "run.yaml")
    assert status == 2 and "no answer): do scancel 71 72\nastar: sbatch " in error


def test_jobs_whose_submission_was_not_answered_are_cancelled_with_those_before(folder: Path, astar: Astar) -> None:
    sbatch, queue = (folder.parent / "tools" / name for name in ("sbatch", "queue"))
    late = f"case $* in *my_run-*-train*) echo '71 x RUNNING\n72 y PENDING' >{queue}; exit 1;; esac\necho 71\n"
    sbatch.write_text(f"#!/bin/sh\n{late}")
    assert astar("launch", "--config", "run.yaml")[0] == 2
    assert [call[:3] for call in calls(folder)] == [["scancel", "71", "72"]]


# --- the jobs of a run


def test_jobs_of_any_stage_are_asked_for_by_their_names_and_cancelled_by_their_numbers(
    folder: Path, astar: Astar
) -> None:
    (folder / "run.yaml").write_text(SMALL + "rollout: {num_engines: 9}\n")  # which would need flags to be launched
    assert astar("jobs", "status", "--config", "run.yaml")[0] == 0
    (asked,) = all_calls(folder)
    names = [f"{named(folder)}-{stage}" for stage in ("sweep", "train", "eval", "export")]
    assert asked[0] == "squeue" and f"--name={','.join(names)}" in asked
    assert astar("jobs", "cancel", "--config", "run.yaml")[1] == "none of the run's jobs waits or runs\n"
    (folder.parent / "tools" / "queue").write_text("71 a-train PENDING\n75 a-export RUNNING\n")
    cancelled = "cancelled job 71: a-train\ncancelled job 75: a-export\n"
    assert astar("jobs", "cancel", "--config", "run.yaml")[1] == cancelled
    assert [call[:-1] for call in calls(folder)] == [["scancel", "71", "75"]]
    assert "expected status, logs or cancel" in astar("jobs", "stop", "--config", "run.yaml")[2]
    assert "there are no jobs" in astar("jobs", "status", "--config", "run.yaml", "--set", "slurm.backend=local")[2]


def test_runs_whose_folders_have_one_name_have_jobs_of_different_names(
    folder: Path, astar: Astar, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "below").mkdir()
    shutil.copy("run.yaml", "below")
    for working in (folder, folder / "below"):
        monkeypatch.chdir(working)
        assert astar("jobs", "status", "--config", "run.yaml")[0] == 0
    first, second = ({word for word in call if word.startswith("--name=")}.pop() for call in all_calls(folder))
    assert first != second and all(re.match(r"--name=my_run-\w{8}-sweep,", name) for name in (first, second))
    assert re.fullmatch(r"run-\w{8}", title(run_config(run_dir="/")))


def test_who_is_asked_for_and_what_is_submitted_do_not_hang_on_variables_of_slurms_commands(
    folder: Path, astar: Astar, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that nobody knows, tasks of one run side by side, a filter that hides jobs, an outer job's numbers."""
    decided = ("SBATCH_JOB_NAME", "SBATCH_ARRAY_INX", "SBATCH_WAIT", "SQUEUE_PARTITION", "SLURM_ARRAY_TASK_ID")
    kept = ("SBATCH_ACCOUNT", "SLURM_CONF", "MINE")
    for name in (*decided, *kept):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("LOGNAME", "somebody")
    environment = slurm.environment()
    assert not environment.keys() & {*decided} and {*kept} <= environment.keys()
    assert "SBATCH_ACCOUNT" not in slurm.environment(["account"])
    assert slurm.user() == pwd.getpwuid(os.getuid()).pw_name
    assert astar("launch", "--config", "run.yaml", "--stages", "train")[0] == 0
    assert f"--user={slurm.user()}" in all_calls(folder)[0]


def test_a_run_that_is_in_the_queue_is_not_submitted_again(folder: Path, astar: Astar) -> None:
    """Nor are other stages of it, which would not wait for that one."""
    (folder.parent / "tools" / "queue").write_text(f"66 {named(folder)}-train RUNNING\n")
    (folder / "runs" / "my run" / "hf").mkdir(parents=True)
    for stages in ("train", "eval,export"):
        status, out, error = astar("launch", "--config", "run.yaml", "--stages", stages)
        assert (status, out, calls(folder)) == (2, "", [])
        assert f"job 66, {named(folder)}-train, is RUNNING already; cancel it" in error
    (*asked, _), _ = all_calls(folder)
    assert f"--name={','.join(f'{named(folder)}-{stage}' for stage in ('sweep', 'train', 'eval', 'export'))}" in asked


def test_without_a_log_it_is_said_where_those_of_another_backend_are(folder: Path, astar: Astar) -> None:
    assert "those of nemo-run: --set slurm.backend=nemo-run" in astar("jobs", "logs", "--config", "run.yaml")[1]


def test_logs_are_the_ends_of_the_newest_of_each_stage(folder: Path, astar: Astar) -> None:
    for number, moment in (("70", 1.0), ("71", 2.0)):
        driver = folder / "logs" / f"slurm-{number}" / "driver-node1-0.log"
        driver.parent.mkdir(parents=True)
        driver.write_text(f"step 1 of job {number}\n")
        own = folder / "logs" / f"{named(folder)}-train-{number}.log"
        own.write_text("".join(f"line {line} of job {number}\n" for line in range(100)))
        os.utime(own, (moment, moment))
    lines = astar("jobs", "logs", "--config", "run.yaml")[1].splitlines()
    assert lines[0:2] == [f"--- logs/{named(folder)}-train-71.log", "line 60 of job 71"]
    assert lines[41:43] == ["--- logs/slurm-71/driver-node1-0.log", "step 1 of job 71"]


# --- this machine


def test_stages_run_here_one_after_the_other_until_one_fails(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    python = folder / "python"
    python.write_text('#!/bin/sh\nshift 2\necho "$@"\n[ "$1" != train ] || exit 7\n')
    python.chmod(0o700)
    words = ["--config", "run.yaml", "--backend", "local", "--set", f"slurm.env=[ASTAR_PYTHON={python}]"]
    command = [sys.executable, "-m", "astar_megatron.cli", "launch", *words, "--set", "data.suffix=' x'"]
    job = {"SLURM_JOB_ID": "5", "SLURMD_NODENAME": "node1"}  # in one too
    done = subprocess.run(
        command, env=os.environ | job | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 7
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [[stage, *rest] for stage, _, _, *rest in lines] == [
        [stage, "--set", "slurm.backend=local"] for stage in ("sweep", "train")
    ]
    assert [load(line[2]).data.suffix for line in lines] == [" x", " x"]
    assert done.stderr == f"{named(folder)}-train ended with status 7; what comes after it is not run\n"


def status_after(begun: Path, words: Sequence[str], send: Callable[[int, int], None], number: signal.Signals) -> int:
    """Launch the run of the current folder here, `send` it a signal once `begun` is there; return how it ends."""
    # What runs in the background, as tests may, ignores Ctrl-C, and so would what it starts.
    command = ["env", "--default-signal=INT", sys.executable, "-m", "astar_megatron.cli", "launch", *words]
    command += ["--config", "run.yaml", "--backend", "local"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, start_new_session=True) as launched:
        try:
            until = time.monotonic() + 300
            while not begun.exists():
                assert time.monotonic() < until and launched.poll() is None
                time.sleep(0.1)
            send(launched.pid, number)
            return launched.wait(60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(launched.pid, signal.SIGKILL)


@pytest.mark.parametrize("send", [os.kill, os.killpg])  # as a program sends it, and as a terminal or `timeout` does
@pytest.mark.parametrize(
    ("number", "heeds"),
    [*itertools.product([signal.SIGTERM, signal.SIGUSR1], [True, False]), (signal.SIGINT, True)],
)
def test_a_signal_lets_the_stage_that_runs_here_save_and_no_other_begins(
    folder: Path, number: signal.Signals, heeds: bool, send: Callable[[int, int], None]
) -> None:
    python = folder / "python"
    saves = "trap 'sleep 1; touch saved; exit 75' TERM USR1 INT\n" if heeds else ""
    python.write_text(f"#!/bin/bash\n{saves}touch begun-$3\nfor _ in {{1..6000}}; do sleep 0.1; done\n")
    python.chmod(0o700)
    words = ["--set", f"slurm.env=[ASTAR_PYTHON={python}]"]
    assert status_after(folder / "begun-sweep", words, send, number) == 75
    assert (folder / "saved").exists() == heeds and not (folder / "begun-train").exists()


@pytest.mark.parametrize("send", [os.kill, os.killpg])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_in_a_setup_of_a_stage_that_runs_here_lets_none_begin(
    folder: Path, number: signal.Signals, status: int, send: Callable[[int, int], None]
) -> None:
    python = folder / "python"
    python.write_text("#!/bin/sh\ntouch begun-$3\n")
    python.chmod(0o700)
    (folder / "setup").write_text("touch begun\nsleep 2\n")  # for whose end the shell waits, whatever it is sent
    words = ["--set", f"slurm.env=[ASTAR_PYTHON={python}]", "--set", "slurm.setup=sh setup"]
    assert status_after(folder / "begun", words, send, number) == status
    assert not list(folder.glob("begun-*"))


def test_the_stage_that_runs_here_ends_with_a_launcher_that_is_killed(folder: Path) -> None:
    python = folder / "python"
    python.write_text("#!/bin/bash\ntrap 'touch saved; exit 75' TERM\ntouch begun-$3\nsleep 600 &\nwait\n")
    python.chmod(0o700)
    words = ["--set", f"slurm.env=[ASTAR_PYTHON={python}]"]

    def kill(launcher: int, number: int) -> None:
        os.kill(launcher, number)
        until = time.monotonic() + 60
        while not (folder / "saved").exists():
            assert time.monotonic() < until
            time.sleep(0.1)

    assert status_after(folder / "begun-sweep", words, kill, signal.SIGKILL) == -signal.SIGKILL
    assert not (folder / "begun-train").exists()


def test_ctrl_c_between_two_stages_that_run_here_is_ctrl_c(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PassedOn, "wait", lambda signals, process: signals._hear(signal.SIGINT, None) or process.wait())
    python = folder / "python"
    python.write_text("#!/bin/sh\ntouch begun-$3\n")
    python.chmod(0o700)
    cfg = load("run.yaml", ["slurm.backend=local", f"slurm.env=[ASTAR_PYTHON={python}]"])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        assert sbatch.run_here(jobs_of(cfg, "run.yaml"), cfg.slurm, dry_run=False) == 130
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert [file.name for file in folder.glob("begun-*")] == ["begun-sweep"]


def test_a_setup_of_a_stage_that_runs_here_may_use_the_terminal(folder: Path) -> None:
    python = folder / "python"
    python.write_text("#!/bin/sh\necho began $3\n")
    python.chmod(0o700)
    words = f"--config run.yaml --backend local --set slurm.env=[ASTAR_PYTHON={python}] --set 'slurm.setup=stty -ixon'"
    command = ["script", "-qec", f"{sys.executable} -m astar_megatron.cli launch {words}", "/dev/null"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    lines = [f"began {stage}" for stage in ("sweep", "train", "eval")]
    assert (done.returncode, done.stdout.splitlines()) == (0, lines), done.stdout


# --- the body as nemo-run takes it


def rendered(folder: Path, command: str) -> str:
    """The script that nemo-run would make of the template for a job in `folder`/job."""
    jinja2 = pytest.importorskip("jinja2")
    template = scripts.write_ray_template(folder / "templates")
    job = folder / "job"
    return jinja2.Template(template.read_text()).render(
        sbatch_flags=["#SBATCH --nodes=4", "#SBATCH --job-name=mine"],
        env_vars=["export ASTAR_PORT='20000'"],
        log_dir=f"{job}/ray/logs",
        cluster_dir=f"{job}/ray",
        command_workdir="/nemo_run/code",
        common_srun_args=f"--container-image=a/b:1 --mpi=pmix --container-mounts /data:/data,{job}:/nemo_run -p=x",
        setup_lines=None,
        command=command,
    )


def test_the_template_is_the_body_after_what_nemo_run_fills_in(tmp_path: Path) -> None:
    script = rendered(tmp_path, "python -m astar_megatron.cli train --config run.yaml")
    flags = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    own = [line for line in (ROOT / "slurm" / "train.sbatch").read_text().splitlines() if line.startswith("#SBATCH")]
    assert flags == [*own, "#SBATCH --nodes=4", "#SBATCH --job-name=mine"]  # the later one wins
    body = (ROOT / "slurm" / "train.sbatch").read_text().splitlines()[1:]
    assert script.rstrip().endswith("\n".join(line for line in body if line not in own))
    assert [path.suffixes for path in (tmp_path / "templates").iterdir()] == [[".sub", ".j2"]]
    again = scripts.write_ray_template(tmp_path / "templates")
    assert [again] == list((tmp_path / "templates").iterdir())


def test_a_template_that_could_not_be_written_is_not_there(tmp_path: Path) -> None:
    """A limit of a file's size stands for a full disk."""
    program = (
        "import resource, signal, pathlib\nfrom astar_megatron.launch import scripts\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "scripts.write_ray_template(pathlib.Path('templates'))"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert "StorageError" in done.stderr and list((tmp_path / "templates").iterdir()) == []


@pytest.mark.parametrize("is_shipped", [False, True])
def test_the_template_runs_the_command_with_code_that_was_shipped(tmp_path: Path, is_shipped: bool) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$PYTHONPATH" "$image" "$ASTAR_MOUNTS" "$@"\n')
    python.chmod(0o700)
    code = tmp_path / "job" / "code"
    code.mkdir(parents=True)
    (tmp_path / "run.yaml").touch()
    if is_shipped:
        (code / "run.yaml").touch()
    words = "--set 'data.suffix=a  b' --set 'data.suffix=\" `x` $HOME'"
    script = rendered(tmp_path, f"python -m astar_megatron.cli eval --config run.yaml {words}")
    script = script.replace('\nmain "$@"', '\nimage=$ASTAR_IMAGE ASTAR_IMAGE=\nexport image\nmain "$@"')  # no job's
    environment = {"PATH": os.environ["PATH"], "ASTAR_PYTHON": str(python)}  # no job of Slurm's
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        *(str(code), "a/b:1", f"/data:/data,{code.parent}:/nemo_run,{code}:{code}"),
        *("-m", "astar_megatron.cli", "eval", "--config", str(code / "run.yaml") if is_shipped else "run.yaml"),
        *("--set", "data.suffix=a  b", "--set", 'data.suffix=" `x` $HOME', "--set", "slurm.backend=local"),
    ]
    done = subprocess.run(["bash", "-c", rendered(tmp_path, "hostname")], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "expected a command with --config FILE, got: hostname" in done.stderr


def test_the_home_of_nemo_run_must_be_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text("server:/x /shared nfs4 rw 0 0\ntmpfs /run tmpfs rw 0 0\ndisk / ext4 rw 0 0\n")
    assert checks.file_system(Path("/shared/runs"), mounts) == "nfs4"
    assert checks.file_system(Path("/sharedx"), mounts) == "ext4"
    (tmp_path / "link").symlink_to("/shared")
    assert checks.file_system(tmp_path / "link" / "nemo", mounts) == "nfs4"
    cfg = run_config(run_dir="/shared/runs/x")
    for home, kind in (("/run/nemo", "tmpfs"), ("/nemo", "ext4")):
        monkeypatch.setenv("NEMORUN_HOME", home)
        with pytest.raises(ConfigError, match=rf"NEMORUN_HOME: {home} is on {kind}, which each node has for itself"):
            checks.of_nemo_run(cfg, "run.yaml", mounts)
    monkeypatch.setenv("NEMORUN_HOME", "/shared/nemo")
    checks.of_nemo_run(cfg, "run.yaml", mounts)
    checks.of_nemo_run(run_config(run_dir="/runs/x"), "run.yaml", mounts)
    elsewhere = run_config(run_dir="/shared/runs/x", slurm={"ssh": "me@host:/jobs"})
    for home in ("/shared/my nemo", "/shared/n'q", "/shared/n$q", "relative/nemo"):
        monkeypatch.setenv("NEMORUN_HOME", home)
        for own in (cfg, elsewhere):
            with pytest.raises(ConfigError, match=f"NEMORUN_HOME: {re.escape(repr(home))}: nemo-run's scripts take a"):
                checks.of_nemo_run(own, "run.yaml", mounts)
    monkeypatch.setenv("NEMORUN_HOME", f"{mounts}/nemo")
    with pytest.raises(ConfigError, match=rf"{mounts} is no folder that you may write to"):
        checks.of_nemo_run(run_config(run_dir=str(tmp_path)), "run.yaml", mounts)


def test_git_ships_only_what_is_committed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> None:
        who = ["-c", "user.name=x", "-c", "user.email=x@y"]
        subprocess.run(["git", *who, *words], check=True, capture_output=True)

    cfg = run_config(run_dir=str(folder / "runs"), slurm={"packager": "git", "ssh": "me@host:/jobs"})
    git("init")
    with pytest.raises(ConfigError, match=r"slurm\.packager: git ships what is committed, and run\.yaml is not: error"):
        checks.of_nemo_run(cfg, "run.yaml")
    git("add", ".")
    git("commit", "-m", "x")
    (folder / "later.py").touch()
    checks.of_nemo_run(cfg, "run.yaml")
    (folder / "run.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"1 files have changed since, as run\.yaml; commit them"):
        checks.of_nemo_run(cfg, "run.yaml")
    git("commit", "-am", "x")
    (folder / "below").mkdir()
    monkeypatch.chdir(folder / "below")
    with pytest.raises(ConfigError, match=r"git ships the repository, where the file is run\.yaml; launch at its root"):
        checks.of_nemo_run(cfg, "../run.yaml")


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
