"""What the command line makes sure of before all else."""

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import samples
import yaml

ROOT = Path(__file__).parents[1]
PROGRAM = """
import os, sys
from astar_megatron.cli_start import check_start
check_start()
with open(sys.argv[1], "w") as file:
    file.write(f"{file.fileno() > 2} {sys.stdin.read()!r}")
    print("on stdout"), print("on stderr", file=sys.stderr), os.write(2, b"on 2")
"""


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_file_never_takes_the_place_of_a_closed_stream(closed: str, tmp_path: Path) -> None:
    command = ["bash", "-c", f'"$@" {closed}', "x", sys.executable, "-c", PROGRAM, str(tmp_path / "file")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0
    assert (tmp_path / "file").read_text() == "True ''"


CONFIGURED = ("train", "sweep", "eval", "export", "compare", "data")
SAYS = """
from rich.console import Console
from astar_megatron.cli_start import check_start
from astar_megatron.doctor import show
from astar_megatron.run.machine import Finding
from astar_megatron.run.tracking import Screen
check_start()
Screen().say("\\xb1 \\udcff, at s3://me:S3cret@hub/x")
show([Finding(subject="\\xb1", level="ok", state="\\udcff", remedy="s3://me:S3cret@hub/x")], Console())
"""


def test_what_an_encoding_lacks_is_said_as_an_escape_and_a_login_is_not_said(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", SAYS], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "\\xb1 \\udcff, at s3://<login>@hub/x\nok    \\xb1: \\udcff; s3://<login>@hub/x\n"
    command = [sys.executable, "-P", "-m", "astar_megatron.cli", "plan", "--config", os.fsdecode(b"\xff \xc2\xb1.yaml")]
    refused = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert refused.returncode == 2 and "\\udcff \\xb1.yaml" in refused.stderr


def test_a_current_folder_that_is_gone_is_named(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    command = [
        "bash",
        "-c",
        'rmdir "$PWD" && "$@"',
        "x",
        sys.executable,
        "-P",
        "-m",
        "astar_megatron.cli",
        "data",
        "--help",
    ]
    done = subprocess.run(
        command, cwd=tmp_path / "gone", env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == "astar: the current folder is gone; change to one that is there (cd)\n"


@pytest.mark.parametrize(
    "words",
    [
        *("doctor", "train", "train --dry-run", "sweep", "sweep --inspect", "eval", "export", "scale run study.yaml"),
        *(
            "compare --methods grpo --budget tokens=9",
            "convert inspect x",
            "data import-stage1 x",
            "doctor --cluster x:1",
        ),
    ],
)
def test_a_limit_of_addresses_is_named_before_torch_aborts_of_it(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, astar: Any
) -> None:
    limits = {resource.RLIMIT_AS: (3 << 30, resource.RLIM_INFINITY)}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits.get(kind, (resource.RLIM_INFINITY,) * 2))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(samples.run_tree(run_dir=str(tmp_path / "run"))))
    config = ["--config", tmp_path / "run.yaml"] if words.split()[0] in CONFIGURED else []
    status, out, error = astar(*words.split(), *config)
    assert (status, out) == (2, "")
    assert error.startswith("astar: ulimit -v: a process may map 3.0 GiB, expected 6 GiB or more (")
    assert error.count("\n") == 1


def test_what_needs_no_torch_runs_under_a_limit_of_addresses(tmp_path: Path) -> None:
    command = ["bash", "-c", 'ulimit -v 3000000 && "$@"', "x", sys.executable, "-P", "-m", "astar_megatron.cli"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    words = ["data", "multiply", "--rows", "2", "--out", "x.jsonl"]
    assert subprocess.run([*command, *words], cwd=tmp_path, env=environment, capture_output=True).returncode == 0
    refused = subprocess.run([*command, "doctor"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert refused.returncode == 2 and "ulimit -v" in refused.stderr
