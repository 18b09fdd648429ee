"""A built wheel in an empty environment, away from the repository: what can runs there, the rest says what it needs."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from email.message import Message
from email.parser import Parser
from importlib.metadata import version
from pathlib import Path

import pytest
import samples
import yaml
from plan_page import SHAPES

ROOT = Path(__file__).resolve().parents[1]
type Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the tracked files, which may be built only with what the package index has."""
    folder = tmp_path_factory.mktemp("wheel")
    _pip(sys.executable, "wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT))
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def astar(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return a function that runs the installed `astar` in a folder of its own, with nothing of this environment."""
    folder = tmp_path_factory.mktemp("empty")
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True, timeout=300)
    _pip(str(folder / "venv/bin/python"), "install", str(wheel))
    shutil.copyfile(ROOT / "configs/demo.yaml", folder / "demo.yaml")

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [folder / "venv/bin/astar", *words]
        environment = {"PATH": os.environ["PATH"], "HOME": str(folder)}
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)

    return run


def _pip(python: str, *words: str) -> None:
    command = [python, "-m", "pip", "--disable-pip-version-check", *words]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    if any(
        words in done.stderr for words in ("No matching distribution", "Could not find a version", "ConnectionError")
    ):
        pytest.skip(f"pip finds no package index: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr


def printed(done: subprocess.CompletedProcess[str]) -> str:
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.slow
def test_what_needs_no_extra_runs_from_a_wheel(astar: Run) -> None:
    assert printed(astar("--version")).rstrip().endswith(f"astar-megatron {version('astar-megatron')}")
    help_text = printed(astar("--help"))
    assert all(name in help_text for name in ("sweep", "train", "plan", "data", "export", "launch"))
    folder = Path(str(astar("--help").args[0])).parents[2]
    printed(astar("data", "countdown", "--rows", "5", "--out", "x.jsonl"))
    assert len(samples.read_jsonl(folder / "x.jsonl")) == 5
    (folder / "model").mkdir()
    (folder / "model/config.json").write_text(json.dumps(SHAPES["1.5b"]))
    (folder / "run.yaml").write_text(
        yaml.safe_dump(samples.run_tree(model={"path": "model"}, data={"path": "x.jsonl"}))
    )
    assert "policy rank 0" in printed(astar("plan", "--config", "run.yaml", "--gpu", "H200"))
    done = astar("launch", "--dry-run", "--config", "demo.yaml")
    assert done.returncode == 0 and done.stderr.startswith("astar: jobs run the python3 of their nodes")
    assert "site-packages/astar_megatron/slurm/train.sbatch" in done.stdout and str(ROOT) not in done.stdout


@pytest.mark.slow
def test_what_needs_a_lane_names_the_setup_that_makes_it_from_a_wheel(astar: Run) -> None:
    for command in (("train",), ("export", "--push-to-hub", "a/b")):
        done = astar(*command, "--config", "demo.yaml")
        assert done.returncode == 2
        assert "is not installed: run `make setup` in a checkout of astar-megatron" in done.stderr


@pytest.mark.slow
def test_a_wheel_says_what_it_is_and_holds_what_it_needs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (name,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        metadata: Message = Parser().parsestr(archive.read(name).decode())
    assert (metadata["License-Expression"], metadata["Description-Content-Type"]) == ("Apache-2.0", "text/markdown")
    assert "Operating System :: POSIX :: Linux" in metadata.get_all("Classifier", [])
    assert metadata.get_payload() == (ROOT / "README.md").read_text(encoding="utf-8")
    assert {"astar_megatron/slurm/train.sbatch", "astar_megatron/slurm/sweep.sbatch", "conversion/plan.py"} <= names
    assert {name.partition("/")[0] for name in names} == {
        "astar_megatron",
        "conversion",
        name.partition("/")[0],  # the metadata
    }
