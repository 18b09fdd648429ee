"""What nemo-run does with the stages on this machine: its command line, and a user's own experiment.

nemo-run lives in an environment of its own; the tests take the one whose `nemorun` is on PATH.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from samples import LAUNCHED, run_config

from astar_megatron.config import load
from astar_megatron.launch.stages import title

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "astar_megatron" / "launch" / "README.md"
RUN = """
run_dir: runs/mine
model: {path: some/model}
data: {path: some.jsonl}
reward: {name: last_number}
sweep: {table: some/table}
"""

type Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs a program of nemo-run's environment in `tmp_path`, and gives all that it prints."""
    if (nemorun := shutil.which("nemorun")) is None:
        pytest.skip("no nemorun on PATH: pip install '.[launch]' in an environment of its own")
    (tmp_path / "run.yaml").write_text(RUN)
    for file in ("some.jsonl", "some/table/header.json", *(f"some/model/{name}" for name in LAUNCHED)):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("{}")
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "<%s>" "$@"\necho\n')
    python.chmod(0o700)
    monkeypatch.setenv("NEMORUN_HOME", str(tmp_path / "nemo"))
    variables = {"PYTHONPATH": str(ROOT), "COLUMNS": "300"}

    def run(program: str, *words: str) -> str:
        command = [str(Path(nemorun).parent / program), *words]
        done = subprocess.run(
            command, cwd=tmp_path, env=os.environ | variables, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


def tools(folder: Path, monkeypatch: pytest.MonkeyPatch, **texts: str) -> None:
    """Put programs of shell, by their names, before all others."""
    (folder / "tools").mkdir()
    for name, text in texts.items():
        (folder / "tools" / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / "tools" / name).chmod(0o700)
    monkeypatch.setenv("PATH", f"{folder / 'tools'}:{os.environ['PATH']}")


def outputs(folder: Path) -> dict[str, str]:
    """What each job of the newest experiment has written, by its name."""
    return {file.parents[1].name: file.read_text() for file in folder.glob("nemo/experiments/*/*/*/*/*/*/0/stdout.log")}


def test_stages_run_by_the_command_line_of_nemo_run(run: Run, tmp_path: Path) -> None:
    words = ["config=run.yaml", "overrides=['slurm.stages=[train,eval]']", f"python={tmp_path}/python"]
    run("nemorun", "astar", "experiment", *words, "run.executor=local", "--yes")
    sets = "<--set><slurm.stages=[train,eval]><--set><slurm.backend=local>"
    assert outputs(tmp_path) == {
        stage: f"<-m><astar_megatron.cli><{stage}><--config><run.yaml>{sets}\n" for stage in ("train", "eval")
    }


def test_the_command_line_of_nemo_run_sets_any_field_of_the_executor_of_the_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(RUN + "slurm: {gpus_per_node: 4, partition: small, account: mine, time: 60}\n")
    fields = ["run.executor.partition=big", "run.executor.nodes=4", "run.executor.qos=high"]
    fields.append("run.executor.time=00:10:00")  # nemo-run's own default
    words = [*fields, "--factory", "recipe(config='run.yaml')", "--dryrun", "--yes"]
    printed = run("nemorun", "astar", "experiment", "run.executor=slurm", *words)
    for flag in (
        "partition=big",
        "nodes=1",
        "qos=high",
        "signal=B:USR1@300",
        "gpus-per-node=4",
        "account=mine",
        "time=00:10:00",
    ):
        assert f"#SBATCH --{flag} " in printed, flag  # nemo-run fills its lines up
    name = title(run_config(run_dir=str(tmp_path / "runs" / "mine")))
    assert f"#SBATCH --job-name={name}-train " in printed
    assert "start_nodes" in printed  # of slurm/train.sbatch


def test_a_flag_that_asks_for_gpus_in_its_own_way_stands_in_place_of_the_key(run: Run, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(RUN + "slurm: {gpus_per_node: 4, flags: ['--gpus-per-node=h100:4']}\n")
    words = ["--config", "run.yaml", "--stages", "train,export", "--backend", "nemo-run", "--dry-run"]
    train, export = run("python", "-m", "astar_megatron.cli", "launch", *words).split("# export: begins when")
    lines = [line for line in train.splitlines() if line.startswith("#SBATCH --g")]
    assert lines == ["#SBATCH --gpus-per-node=h100:4"]
    assert "#SBATCH --nodes=1\n" in export and "#SBATCH --g" not in export


def test_an_export_keeps_what_is_no_gpu(run: Run, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(RUN + "slurm: {gpus_per_node: 4, flags: ['--gres=nvme:1', --exclusive]}\n")
    words = ["--config", "run.yaml", "--stages", "train,export", "--backend", "nemo-run", "--dry-run"]
    for script in run("python", "-m", "astar_megatron.cli", "launch", *words).split("# export: begins when"):
        assert "#SBATCH --gres=nvme:1\n" in script and "#SBATCH --exclusive\n" in script


@pytest.mark.parametrize(
    "container", ["{image: my image}", "{image: 'a;b'}", "{image: a/b, mounts: ['/my data:/data']}"]
)
def test_a_container_whose_name_its_scripts_would_cut_or_run_is_refused(
    run: Run, tmp_path: Path, container: str
) -> None:
    (tmp_path / "run.yaml").write_text(RUN + f"slurm: {container}\n")
    with pytest.raises(AssertionError, match=r"nemo-run's scripts take letters, digits and \. _"):
        run("python", "-m", "astar_megatron.cli", "launch", "--config", "run.yaml", "--backend", "nemo-run")


def test_jobs_that_could_not_be_cancelled_are_named(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accepts = "[ -e first ] && { echo invalid account >&2; exit 1; }; touch first; echo 70"
    tools(tmp_path, monkeypatch, sbatch=accepts, squeue="", scancel="echo no answer >&2; exit 1")
    words = ["--config", "run.yaml", "--stages", "train,eval", "--backend", "nemo-run"]
    with pytest.raises(AssertionError, match=r"invalid account; left in the queue, for .* no answer\): do scancel 70"):
        run("python", "-m", "astar_megatron.cli", "launch", *words)


@pytest.mark.parametrize("action", ["status", "cancel"])
def test_a_slurm_that_does_not_answer_is_one_line(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    tools(tmp_path, monkeypatch, sbatch="echo 70", squeue="[ ! -e down ] || { echo Slurm is down >&2; exit 1; }")
    words = ["--config", "run.yaml", "--set", "slurm.backend=nemo-run"]
    run("python", "-m", "astar_megatron.cli", "launch", *words)
    (tmp_path / "down").touch()
    with pytest.raises(AssertionError, match=r"^astar: the run's jobs can't be asked for: squeue .*: Slurm is down\n"):
        run("python", "-m", "astar_megatron.cli", "jobs", action, *words)


@pytest.mark.parametrize("logs", [None, "my logs"])
def test_logs_are_the_ends_of_the_newest_launch_that_was_not_refused(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logs: str | None
) -> None:
    tools(tmp_path, monkeypatch, sbatch="[ ! -e refuses ] || { echo invalid account >&2; exit 1; }\necho 70", squeue="")
    env = f", env: ['ASTAR_LOGS={logs}']" if logs else ""
    (tmp_path / "run.yaml").write_text(RUN + f"slurm: {{backend: nemo-run, stages: [train]{env}}}\n")
    astar = ["python", "-m", "astar_megatron.cli"]
    run(*astar, "launch", "--config", "run.yaml")
    assert "no job of the run has a log in " in run(*astar, "jobs", "logs", "--config", "run.yaml")
    (code,) = (tmp_path / "nemo" / "experiments").rglob("code")
    name = title(run_config(run_dir=str(tmp_path / "runs" / "mine")))
    driver = tmp_path / logs / f"{name}-train" if logs else code.parent / "ray" / "logs"
    driver.mkdir(parents=True, exist_ok=True)
    (code.parent / "log_mine_70.out").write_text("of the job\n")
    (driver / "driver-node1-0.log").write_text("of the program\n")
    (tmp_path / "refuses").touch()
    with pytest.raises(AssertionError, match="invalid account; none is left"):
        run(*astar, "launch", "--config", "run.yaml")
    shown = run(*astar, "jobs", "logs", "--config", "run.yaml")
    assert "of the job\n" in shown and "of the program\n" in shown


def test_an_executor_smaller_than_the_run_is_refused(run: Run, tmp_path: Path) -> None:
    large = "parallel: {data: 8}\nrollout: {num_engines: 8}\nslurm: {nodes: 2, gpus_per_node: 8}\n"
    (tmp_path / "run.yaml").write_text(RUN + large)
    for field, value, needed in (("nodes", 1, 2), ("gpus_per_node", 4, 8)):
        with pytest.raises(
            AssertionError, match=rf"executor\.{field}: {value}, but .* was planned for {needed}; raise it"
        ):
            words = ["run.executor=slurm", f"run.executor.{field}={value}", "config=run.yaml", "--dryrun", "--yes"]
            run("nemorun", "astar", "experiment", *words, "overrides=['slurm.stages=[train]']")


def test_nothing_is_written_where_the_home_of_nemo_run_is_not_set(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NEMORUN_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(AssertionError, match="NEMORUN_HOME: not set; jobs read and write below it"):
        run("nemorun", "astar", "experiment", "config=run.yaml", "--dryrun", "--yes")
    assert list(tmp_path.glob("home/.nemo_run/astar")) == []


def test_jobs_get_the_environment_whatever_the_site_has_set_but_for_what_wins_over_their_scripts(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("EXPORT", "JOB_NAME", "QOS", "MEM_PER_NODE", "PARTITION", "RESERVATION")
    shown = " ".join([*(f"$SBATCH_{name}" for name in names), "$MINE"])
    tools(tmp_path, monkeypatch, sbatch=f'echo "{shown}" >>exports; echo 70', squeue="")
    for name in names:
        monkeypatch.setenv(f"SBATCH_{name}", "other")
    monkeypatch.setenv("MINE", "own")
    run(
        "python",
        "-m",
        "astar_megatron.cli",
        "launch",
        "--backend",
        "nemo-run",
        "--config",
        "run.yaml",
        "--stages",
        "train",
        "--set",
        "slurm.flags=[--qos=high, --mem-per-gpu=4G]",
        "--set",
        "slurm.partition=big",
    )
    assert (tmp_path / "exports").read_text() == "ALL     other own\n"


def test_the_experiment_of_the_guide_runs(run: Run, tmp_path: Path) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```$", GUIDE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    local = code.replace('nemo.slurm_executor(cfg.slurm, "mine")', "run.LocalExecutor()")
    local = local.replace('"configs/gsm8k_qwen2.5_1.5b.yaml"', '"run.yaml"')
    local = local.replace("executor, overrides)", f'executor, overrides, python="{tmp_path}/python")')
    assert local.count("LocalExecutor") == 1 and local.count("run.yaml") == 1 and local.count("python=") == 1
    (tmp_path / "experiment.py").write_text(local)
    run("python", "experiment.py")
    written = outputs(tmp_path)
    assert written.pop("report") == "all stages are done\n"
    assert list(written) == ["train"] and "<--set><optim.lr=2e-6>" in written["train"]


@pytest.mark.parametrize("packager", [[], ["--set", "slurm.packager=some/*"]])
def test_a_job_reads_what_was_checked_whatever_becomes_of_the_file(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packager: list[str]
) -> None:
    """The copy is shipped as code is, which the job's script looks at first."""
    tools(tmp_path, monkeypatch, sbatch='for last; do :; done; cp "$last" "script-$$"; echo 70', squeue="")
    words = ["--config", "run.yaml", "--stages", "train", "--backend", "nemo-run", "--set", "data.suffix='a  b'"]
    run("python", "-m", "astar_megatron.cli", "launch", *words, *packager)
    (tmp_path / "run.yaml").write_text("")
    (script,) = tmp_path.glob("script-*")
    (name,) = re.findall(r"astar_megatron\.cli train --config (\S+)$", script.read_text(), re.MULTILINE)
    (code,) = (tmp_path / "nemo" / "experiments").rglob("code")
    assert load(code / name).data.suffix == "a  b" and load(code / name).run_dir == "runs/mine"
    assert (code / "some" / "table").exists() == (packager != [])
