"""`make gpu-check` says in words what a machine lacks, and skips what it has no packages for by their names."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
WITHOUT = """
import os, sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *more):
        missing = os.environ.get("MISSING", "").split()  # a reward's process has no such variable, and lacks nothing
        return None if name.partition(".")[0] in missing else self.finder.find_spec(name, *more)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Without, sys.meta_path)
"""
OTHERS = "hypothesis megatron pyarrow pydantic ray rich safetensors tokenizers transformers typer vllm yaml"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Return a function that imports a program of tests/benchmarks."""
    monkeypatch.syspath_prepend(str(ROOT / "tests/benchmarks"))
    return importlib.import_module


def run(command: list[str], folder: Path, missing: str) -> subprocess.CompletedProcess[str]:
    """In a python without the packages `missing`, which sees no GPU."""
    (folder / "sitecustomize.py").write_text(WITHOUT)
    path = os.pathsep.join([str(folder), str(ROOT), str(ROOT / "tests/benchmarks")])
    more = {"PYTHONPATH": path, "MISSING": missing, "CUDA_VISIBLE_DEVICES": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(command, cwd=ROOT, env=os.environ | more, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("missing", "words"),
    [("torch", "has no torch"), ("pytest triton", "has no triton and no pytest"), ("", "sees no GPU")],
)
def test_what_the_machine_lacks_is_one_line(missing: str, words: str, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed: that is what gpu-check would say")
    done = run(["make", "--silent", "gpu-check", f"GPU_PYTHON={sys.executable}"], tmp_path, missing)
    first, *rest = done.stderr.splitlines()
    assert done.returncode and first.startswith("gpu-check: ") and words in first
    assert all(line.startswith("make") for line in rest) and not done.stdout


@pytest.mark.parametrize(
    "missing", [OTHERS, "megatron", pytest.param("transformers tokenizers safetensors", marks=pytest.mark.slow)]
)
def test_a_test_without_its_packages_is_skipped_by_name(missing: str, tmp_path: Path) -> None:
    options = ["-p", "no:cacheprovider", "-m", "gpu", "-rs", "--collect-only"]
    files = ["tests/model", "tests/conversion/test_every_way.py"]
    done = run([sys.executable, "-m", "pytest", *options, *files], tmp_path, missing)
    assert done.returncode == 0, done.stdout
    assert "tests/model/test_head_on_gpu.py::" in done.stdout  # they need torch and Triton alone
    assert any(f"No module named '{package}" in done.stdout for package in missing.split())


def test_the_table_of_a_rank_runs_without_a_gpu_too(tmp_path: Path) -> None:
    """A tiny shape: the program that watches over the fusions is itself known to work."""
    for package in ("megatron", "pydantic", "safetensors", "yaml"):
        pytest.importorskip(package)
    report = tmp_path / "rank.json"
    command = [sys.executable, "tests/benchmarks/gpu_rank.py", "tiny", "--steps", "1", "--json", str(report)]
    done = run(command, tmp_path, "")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(report.read_text())
    assert row["shape"] == "tiny" and row["step, s"] > 0 and row["tokens/s"] > 0 and row["peak GiB"] > 0


@pytest.mark.parametrize(
    ("program", "missing", "status", "words"),
    [
        ("gpu_head.py", OTHERS, 1, "sees no GPU"),  # it needs torch and Triton alone
        ("gpu_rank.py", "megatron", 0, "gpu-check: no megatron here: the table"),
        ("gpu_rank.py", "", 1, "sees no GPU"),
    ],
)
def test_a_table_says_what_it_lacks(program: str, missing: str, status: int, words: str, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed: the tables need it")
    done = run([sys.executable, f"tests/benchmarks/{program}"], tmp_path, missing)
    lines = (done.stdout + done.stderr).splitlines()
    assert done.returncode == status and len(lines) == 1, lines
    assert lines[0].startswith("gpu-check: ") and words in lines[0]


@pytest.mark.parametrize(
    ("change", "is_lost"),
    [({}, True), ({"mfu": 0.48}, False), ({"mfu": None}, False), ({"transformer_engine": False}, False)],
)
def test_a_step_that_lost_its_fusions_is_named(
    change: dict[str, object], is_lost: bool, benchmark: Callable[[str], Any]
) -> None:
    """0.24 is what the shape had without them."""
    report = {"shape": "1.5b", "transformer_engine": True, "mfu": 0.24} | change
    words = benchmark("gpu_rank").lost(report)
    assert words is None if not is_lost else "gpu-check: an MFU of 0.24 at the shape 1.5b" in words


@pytest.mark.slow
def test_generation_is_measured_without_a_gpu_too(tmp_path: Path) -> None:
    for package in ("vllm", "ray", "safetensors"):
        pytest.importorskip(package)
    report = tmp_path / "generation.json"
    small = ["--shape", "tiny", "--requests", "4", "--tokens", "16", "--graphs", "none", "--runners", "1"]
    done = run([sys.executable, "tests/benchmarks/gpu_generation.py", *small, "--json", str(report)], tmp_path, "")
    assert done.returncode == 0, done.stderr
    rows = json.loads(report.read_text())["rows"]
    assert [row["kind"] for row in rows] == ["plain", "seeds", "seeds and log-probs", "seeds and log-probs"]
    assert [row["who"] for row in rows] == [*["bare vLLM, runner V1"] * 3, "the pool"]
    assert all(row["tokens/s"] > 0 and row["ms a decode step"] > 0 for row in rows)


@pytest.mark.slow
def test_turns_are_measured_without_a_gpu_too(tmp_path: Path) -> None:
    for package in ("vllm", "ray", "megatron", "transformers"):
        pytest.importorskip(package)
    report = tmp_path / "sharing.json"
    small = ["--shape", "tiny", "--steps", "2", "--json", str(report)]
    done = run([sys.executable, "tests/benchmarks/gpu_sharing.py", *small], tmp_path, "")
    assert done.returncode == 0, done.stderr
    row = json.loads(report.read_text())
    parts = ("to publish, s", "to generate, s", "to train, s", "publish, s")
    assert row["steps"] == 2 and 0 < sum(row[part] for part in parts) <= 2 * row["their largest, s"]
    assert row["returned_bytes, least"] == row["returned_bytes, most"] > 0 == row["kept_bytes, most"]


def test_turns_that_take_too_long_or_give_less_back_are_named(benchmark: Callable[[str], Any]) -> None:
    sound = {"kept_bytes, least": 7, "kept_bytes, most": 64 << 20, "turns and publish, s": 0.8}
    sound |= {"returned_bytes, least": 128 << 20, "returned_bytes, most": 128 << 20}
    changes = ({}, {"turns and publish, s": 0.81}, {"kept_bytes, most": (64 << 20) + 8}, {"returned_bytes, least": 8})
    faults = benchmark("gpu_sharing").faults
    assert [faults(sound | change, "1.5b") for change in changes] == [
        [],
        ["turn and publish take 0.81 s, expected 0.8 at most"],
        ["kept_bytes go from 7 to 67108872, expected the same"],
        ["returned_bytes go from 8 to 134217728, expected the same"],
    ]
