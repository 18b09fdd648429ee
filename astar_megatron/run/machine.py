"""What this machine has and lacks for a run, and why, in words."""

import importlib.metadata
import platform
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from astar_megatron.cluster import session
from astar_megatron.cluster.cores import available_cores
from astar_megatron.cluster.errors import NoFolderError
from astar_megatron.model.compute_type import native_bfloat16
from astar_megatron.run.local_accelerators import local_accelerators
from astar_megatron.run.resources import (
    GIB,
    available_memory_bytes,
    free_bytes,
    gib,
    shared_memory_bytes,
)

DEMO_BYTES = 10 * GIB  # `make demo` at work
DEMO_SHARED_BYTES = GIB + session.OBJECT_STORE_BYTES
DISK_BYTES = 10 * GIB  # an environment and a few checkpoints of a small model
_OWN_NAME = "astar-megatron"
_SET_UP = f"run `make setup` in a checkout of {_OWN_NAME}, and take its .venv"  # a lane asks for more than pip reads
_BROUGHT_BY = {
    "huggingface_hub": "huggingface-hub",
    "math_verify": "math-verify",
    "safetensors": "transformers",
    "tokenizers": "transformers",
}
_PYTHONS = ((3, 12), (3, 15))  # from, below

type Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One fact about the machine. `warn`: it works, but slowly or not for everything; `fail`: it can't work."""

    subject: str
    level: Level
    state: str
    remedy: str = ""


def report() -> list[Finding]:
    """Return what this machine has and lacks for a run."""
    requirements = _own_requirements()
    lanes, accelerators = _installed_lanes(requirements, _version), local_accelerators()
    return [
        _python(),
        *packages(requirements, _version),
        _accelerator(None if accelerators is None else [accelerator.name for accelerator in accelerators], lanes),
        *_processor(available_cores(), native_bfloat16()),
        _space("memory", available_memory_bytes(), DEMO_BYTES, "close other programs; `make demo` needs it"),
        _space(
            "/dev/shm",
            shared_memory_bytes(),
            DEMO_SHARED_BYTES,
            "remove old files there, enlarge it (docker run --shm-size=2g), make it writable; weights go through it",
        ),
        _sockets(),
        _space("disk", free_bytes(Path.cwd()), DISK_BYTES, "free some space; an environment takes 7 GiB"),
    ]


def packages(requirements: Sequence[str], version: Callable[[str], str | None]) -> list[Finding]:
    """Return whether one lane is installed, with the versions this project is tested with.

    `requirements` are this project's own, as its metadata lists them; `version` gives a package's version or None.
    """
    if not requirements:
        state = f"{_OWN_NAME} runs from its folder and is not installed: versions are not compared"
        return [Finding("packages", "warn", state, _SET_UP)]
    lanes = _installed_lanes(requirements, version)
    if not lanes:
        state = "no lane is installed: there is no vLLM"
        return [Finding("packages", "fail", state, _SET_UP)]
    if len(lanes) > 1:
        state = f"the lanes {' and '.join(lanes)} are both installed, and both own the module vllm"
        return [Finding("packages", "fail", state, f"remove the environment, and {_SET_UP}")]
    findings = []
    for name, wanted in _pins(requirements, lanes[0]):
        got = version(name)
        remedy = f"install {name}=={wanted}, which this version is tested with; `make setup` does"
        if got is None:
            findings.append(Finding(name, "fail", "not installed", remedy))
        elif got.partition("+")[0] != wanted:
            findings.append(Finding(name, "warn", f"{got}, expected {wanted}", remedy))
        else:
            findings.append(Finding(name, "ok", f"{got} (lane {lanes[0]})"))
    return findings


def _python() -> Finding:
    have = sys.version_info[:2]
    state = f"{platform.python_version()} at {sys.executable}, {platform.system()} {platform.machine()}"
    if not _PYTHONS[0] <= have < _PYTHONS[1]:
        return Finding("python", "fail", state, "use Python 3.12, 3.13 or 3.14")
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        remedy = "the pinned packages have binaries for Linux on x86_64; elsewhere they may have to be compiled"
        return Finding("python", "warn", state, remedy)
    return Finding("python", "ok", state)


def _accelerator(names: list[str] | None, lanes: Sequence[str]) -> Finding:
    subject = "accelerator"
    if names is None:
        state = "not known: torch is not installed"
        return Finding(subject, "warn", state, _SET_UP)
    if names and lanes == ["cpu"]:
        state = f"{', '.join(names)}, but the environment is the cpu lane, whose vLLM does not use it"
        return Finding(subject, "warn", state, "run `make setup` on this machine: it makes the lane of GPUs here")
    if len(names) == 1:
        state = f"{names[0]}: the only one, which one Megatron rank and one engine share in training"
        return Finding(subject, "ok", state)
    if names:
        return Finding(subject, "ok", ", ".join(names))
    if Path("/dev/nvidia0").exists() or (lanes and lanes != ["cpu"]):
        state = "torch sees none, though the device or the GPU lane is there"
        return Finding(subject, "warn", state, "look at nvidia-smi: the driver may be too old")
    return Finding(subject, "ok", "none: policy and engines run on the CPU, for small models")


def _processor(cores: float, bfloat16: Sequence[str]) -> list[Finding]:
    remedy = "" if cores >= 2 else "give it two: policy and engine take turns, but the driver works beside them"
    findings = [Finding("cores", "ok" if cores >= 2 else "warn", f"{cores:g}", remedy)]
    if bfloat16:
        state = f"multiplied natively ({', '.join(bfloat16)}); model.dtype auto computes in it"
        return [*findings, Finding("bfloat16", "ok", state)]
    state = "emulated on this CPU (no amx_bf16, no avx512_bf16); model.dtype auto computes in float32 without a GPU"
    return [*findings, Finding("bfloat16", "warn", state, "nothing to do; steps are slower")]


def _sockets() -> Finding:
    try:
        folder, reason = session.folder_for_sessions()
    except NoFolderError as error:
        return Finding("sockets", "fail", str(error), "set TMPDIR as it says")
    state = f"of a run in {folder}" + (f", not in TMPDIR: {reason}" if reason else "")
    return Finding("sockets", "ok", state)


def _space(subject: str, free: int, wanted: int, remedy: str) -> Finding:
    state = f"{gib(free)} free"
    if free >= wanted:
        return Finding(subject, "ok", state)
    level: Level = "warn" if free else "fail"
    return Finding(subject, level, f"{state}, {gib(wanted)} wanted", remedy)


def _own_requirements() -> list[str]:
    try:
        return importlib.metadata.requires(_OWN_NAME) or []
    except importlib.metadata.PackageNotFoundError:
        return []


@cache  # a study asks after each of its runs, and each answer is parsed from a file
def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Return the installed versions of Python, of this project, and of the packages that the installed lane pins."""
    requirements = _own_requirements()
    names = [name for lane in _installed_lanes(requirements, _version) for name, _ in _pins(requirements, lane)]
    installed = {name: _version(name) for name in [_OWN_NAME, *names]}
    return {"python": platform.python_version()} | {name: text for name, text in installed.items() if text}


def _installed_lanes(requirements: Iterable[str], version: Callable[[str], str | None]) -> list[str]:
    """Return the extras whose vLLM is installed: each lane has a package of its own for it."""
    lanes = []
    for requirement in requirements:
        match = re.match(r"(vllm[\w-]*)==.*extra == ['\"](\w+)['\"]", requirement)
        if match and version(match[1]) is not None:
            lanes.append(match[2])
    return lanes


def remedy_without(module: str, requirements: Sequence[str] | None = None) -> str:
    """Return what brings a module which this project imports; "" for other modules.

    `requirements` as in `packages`; without it this project's own.
    """
    own, top = requirements if requirements is not None else _own_requirements(), module.partition(".")[0]
    pattern = re.compile(rf"{re.escape(_BROUGHT_BY.get(top, top))}\b.*extra == ['\"](\w+)['\"]")
    matches = map(pattern.match, own) if top else ()
    extras = list(dict.fromkeys(match[1] for match in matches if match))
    if set(extras) & set(_installed_lanes(own, str)):  # of all lanes
        return _SET_UP
    return " or ".join(f"install {_OWN_NAME}[{extra}]" for extra in extras)


def _pins(requirements: Iterable[str], lane: str) -> list[tuple[str, str]]:
    pattern = re.compile(rf"([\w.-]+)(?:\[[\w,-]+\])?==([\w.]+)\s*;.*extra == ['\"]{lane}['\"]")
    return [(match[1], match[2]) for match in map(pattern.match, requirements) if match]
