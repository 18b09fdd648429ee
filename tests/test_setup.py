"""`.ci/setup`: which lane and which Python it takes; the programs that it calls are stand-ins that write down how."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("sh", "dirname", "cat", "sha256sum", "cut", "grep", "rm", "mkdir", "mktemp", "head", "cp", "chmod")

# Answers as Python $VERSION that has pip; a venv that it makes has itself as its python, and so has what uv makes.
PYTHON = """#!/bin/sh
echo "python $*" >>"$CALLS"
case "$1 $2" in
    "-c ") exit 0 ;;
    "-c import sysconfig"*) echo /usr/include/python ;;
    "-c "*) [ "$3" = "$VERSION" ] && echo "$0" ;;
    "-m venv") [ -z "${NO_VENV:-}" ] && mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && cp "$UV" "$3/bin/uv" ;;
    "-m pip")
        while [ $# -gt 1 ]; do
            if [ "$1" = --target ]; then mkdir -p "$2/bin" && cp "$UV" "$2/bin/uv"; fi
            shift
        done ;;
esac
"""
UV = """#!/bin/sh
echo "uv $*" >>"$CALLS"
[ -z "${NO_DOWNLOAD:-}" ] && mkdir -p .venv/bin && cp "$STAND_IN" .venv/bin/python
"""
GPU = "#!/bin/sh\necho 'NVIDIA H100 80GB HBM3'\n"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder with what .ci/setup reads, and bin/ with the usual tools and the stand-ins; no GPU, no uv on PATH."""
    for name in (".ci/setup", ".ci/cpu-constraints.txt", ".ci/cuda-constraints.txt", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / name)
    for folder in ("bin", "aside"):
        (tmp_path / folder).mkdir()
    for tool in TOOLS:
        (tmp_path / "bin" / tool).symlink_to(str(shutil.which(tool)))
    program(tmp_path / "bin" / "python3", PYTHON)
    program(tmp_path / "aside" / "uv", UV)
    return tmp_path


def program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def setup(tree: Path, version: str = "3.12", **environment: str) -> tuple[int, str, list[str]]:
    """Run it; the exit status, what it says, and the calls."""
    calls = tree / "calls"
    calls.write_text("")
    known = {"PATH": str(tree / "bin"), "HOME": str(tree), "CALLS": str(calls), "VERSION": version}
    known |= {"UV": str(tree / "aside" / "uv"), "STAND_IN": str(tree / "bin" / "python3")}
    command = ["/bin/sh", str(tree / ".ci" / "setup")]
    done = subprocess.run(command, env=known | environment, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr, calls.read_text().splitlines()


def installed(calls: list[str]) -> list[str]:
    return [call.rpartition(" ")[2] for call in calls if "pip install" in call and "--editable" in call]


def constraints(calls: list[str]) -> str:
    (call,) = [call for call in calls if "--editable" in call]
    return call.partition("--constraint ")[2].split()[0]


def test_a_machine_without_a_gpu_gets_the_cpu_lane_and_that_is_said(tree: Path) -> None:
    status, output, calls = setup(tree)
    assert status == 0, output
    assert "setup: lane cpu: nvidia-smi reports no NVIDIA GPU" in output.splitlines()
    assert installed(calls) == [".[cpu,data,demo,dev]"]
    assert constraints(calls) == ".ci/cpu-constraints.txt"
    status, output, calls = setup(tree)
    assert (status, output, installed(calls)) == (0, "", [])


def test_a_gpu_that_the_driver_reports_makes_it_the_cuda_lane_also_later(tree: Path) -> None:
    assert setup(tree)[0] == 0
    program(tree / "bin" / "nvidia-smi", GPU)
    program(tree / "bin" / "c++", "#!/bin/sh\ncat >/dev/null\n")
    status, output, calls = setup(tree)
    assert status == 0, output
    assert "setup: lane cuda: NVIDIA H100 80GB HBM3" in output.splitlines()
    assert installed(calls) == [".[cuda,data,demo,dev]"]
    assert constraints(calls) == ".ci/cuda-constraints.txt"
    program(tree / "bin" / "nvidia-smi", "#!/bin/sh\necho 'no driver' >&2\nexit 9\n")  # it is there, and fails
    status, output, calls = setup(tree)
    assert installed(calls) == [".[cpu,data,demo,dev]"]


@pytest.mark.parametrize("compiler", ["", "#!/bin/sh\necho 'no Python.h' >&2\nexit 1\n"])
def test_the_cuda_lane_without_a_compiler_is_refused_before_anything_is_installed(tree: Path, compiler: str) -> None:
    program(tree / "bin" / "nvidia-smi", GPU)
    if compiler:
        program(tree / "bin" / "c++", compiler)
    status, output, calls = setup(tree)
    assert status == 1 and "no C++20 compiler with Python's headers here" in output and "apt install g++" in output
    assert installed(calls) == []


@pytest.mark.parametrize("without_venv", ["", "1"])
def test_without_a_python_that_fits_uv_gets_its_own(tree: Path, without_venv: str) -> None:
    status, output, calls = setup(tree, version="3.11", NO_VENV=without_venv)
    assert status == 0, output
    assert "no Python 3.12, 3.13 or 3.14 with venv and ensurepip runs here; uv gets its own 3.12" in output
    assert "uv venv --quiet --seed --python 3.12 .venv" in calls
    assert installed(calls) == [".[cpu,data,demo,dev]"]


def test_a_python_that_can_not_be_downloaded_is_said_with_what_to_do(tree: Path) -> None:
    status, output, calls = setup(tree, version="3.11", NO_DOWNLOAD="1")
    assert status == 1 and "uv could not make .venv with a Python 3.12" in output and "apt install python3.12" in output
    assert installed(calls) == [] and not (tree / ".venv").exists()


def test_without_any_python_the_packages_that_help_are_named(tree: Path) -> None:
    (tree / "bin" / "python3").unlink()
    status, output, _ = setup(tree)
    assert status == 1 and "apt install python3-venv" in output
