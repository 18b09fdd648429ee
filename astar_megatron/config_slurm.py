"""The keys of starting a run elsewhere: what `astar launch` asks Slurm or nemo-run for."""

import difflib
import math
import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from astar_megatron.config_file import NAMES_VARIABLE, Name, Section

type Backend = Literal["sbatch", "nemo-run", "local"]
type Stage = Literal["sweep", "train", "eval", "export"]

NOTICE_SECONDS = 300  # that SIGUSR1 comes before the time limit, by slurm/train.sbatch
STAGES: tuple[Stage, ...] = ("sweep", "train", "eval", "export")


# Variables of slurm/train.sbatch that keys set, and those that are numbers with the least and the most.
_BY_KEYS = {
    "ASTAR_PROGRAM": "stages",
    "ASTAR_IMAGE": "image",
    "ASTAR_MOUNTS": "mounts",
    "ASTAR_SETUP": "setup",
}
_NUMBERS = {
    "ASTAR_PORT": (1024, 65535 - 63),  # the first of 64
    "ASTAR_START_SECONDS": (1, 99_999),
    "ASTAR_MAX_REQUEUES": (0, 99_999),
    "ASTAR_SPARE_NODES": (0, 65_535),
    "ASTAR_PREFLIGHT": (0, 1),
}
VARIABLES = (*_BY_KEYS, *_NUMBERS, "ASTAR_PYTHON", "ASTAR_LOGS", "ASTAR_INTERFACE", "ASTAR_SRUN")  # all there are


# Flags of sbatch that launching sets itself, or that would undo what it says; and the keys that are there for them.
_OWN_FLAGS: dict[str, str | None] = {
    **{"nodes": "slurm.nodes", "gpus-per-node": "slurm.gpus_per_node", "account": "slurm.account"},
    **{"partition": "slurm.partition", "time": "slurm.time", "container-image": "slurm.image"},
    **dict.fromkeys(("gpus", "gpus-per-socket", "gpus-per-task"), "slurm.gpus_per_node"),
    **dict.fromkeys(("job-name", "output", "error", "open-mode", "dependency", "kill-on-invalid-dep", "requeue")),
    **dict.fromkeys(("no-requeue", "array", "wait", "wrap", "parsable", "quiet", "test-only", "chdir", "help")),
    "clusters": None,  # others would be asked for the jobs
    "het-group": None,  # a run takes nodes of one kind
}
_WATCHED_FLAGS = (*_OWN_FLAGS, "export", "signal", "time-min")
_LIMIT = r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}|UNLIMITED|INFINITE"  # a time limit of Slurm's


def _variable(value: str) -> str:
    if not re.match(r"[A-Z_][A-Z0-9_]*=", value):
        raise ValueError(f"slurm.env: expected NAME=value with NAME in capitals, got {value!r:.200}")
    name, _, text = value.partition("=")
    if name.startswith("ASTAR_") and not text:
        raise ValueError(f"slurm.env: {value:.200}: empty; leave it out for its default")
    if name.startswith("SBATCH_"):
        raise ValueError(f"slurm.env: {value:.200}: an option of sbatch's own; say it in slurm.flags")
    if name.startswith("ASTAR_") and name not in VARIABLES:
        (nearest,) = difflib.get_close_matches(name, VARIABLES, n=1, cutoff=0.0)
        raise ValueError(f"slurm.env: {name:.200}: no such variable of the batch script; the nearest is {nearest}")
    if key := _BY_KEYS.get(name):
        raise ValueError(f"slurm.env: {value:.200}: slurm.{key} sets that variable; use the key")
    if name in _NUMBERS:
        least, most = _NUMBERS[name]
        if not re.fullmatch(r"0|[1-9][0-9]{0,4}", text) or not least <= int(text) <= most:
            raise ValueError(f"slurm.env: {value:.200}: expected a whole number from {least} to {most}")
    if NAMES_VARIABLE.search(text) or (name in ("ASTAR_LOGS", "ASTAR_PYTHON") and text.startswith("~")):
        raise ValueError(
            f"slurm.env: {value:.200}: no shell reads it, which alone replaces ~ and variables; write it out, or "
            "export it in slurm.setup"
        )
    return value


def _flag(value: str) -> str:
    if not re.fullmatch(r"--[a-z][a-z-]+(=.+)?", value):
        raise ValueError(f"slurm.flags: expected a long flag, as --exclusive or --constraint=gpu, got {value!r:.200}")
    name, _, text = value.removeprefix("--").partition("=")
    longer = [flag for flag in _WATCHED_FLAGS if flag.startswith(name)]
    if longer and name not in longer:
        raise ValueError(f"slurm.flags: {value:.200}: sbatch takes it for --{longer[0]}; write flags in full")
    if name.startswith("export"):
        raise ValueError(f"slurm.flags: {value:.200}: jobs get the whole environment; add variables by slurm.env")
    if name in _OWN_FLAGS and not (name == "gpus-per-node" and re.fullmatch(r"[^:,\s]+:[1-9]\d*", text)):
        key = _OWN_FLAGS[name]
        remedy = f"set {key}" if key else "leave it out: launching sets it, or needs it otherwise"
        raise ValueError(f"slurm.flags: {value:.200}: {remedy}")
    if name == "time-min" and not re.fullmatch(_LIMIT, text):
        raise ValueError(f"slurm.flags: {value:.200}: expected minutes, as 60, or days-hours:minutes:seconds")
    if name == "signal" and not re.fullmatch(r"B:(SIG)?USR1@\d+", text):
        raise ValueError(f"slurm.flags: {value:.200}: the batch script waits for --signal=B:USR1@<seconds>")
    return value


def _login(value: str) -> str:
    if not re.fullmatch(r"[^@:\s]+@[^@:\s]+:/[\w./-]*", value):
        raise ValueError(f"slurm.ssh: expected user@host:/folder of letters, digits and . _ - /, got {value!r:.200}")
    return value


def _minutes(value: Any) -> Any:
    return str(value) if type(value) is int else value  # YAML reads 60 as a number


def _limit(value: str) -> str:
    if not re.fullmatch(_LIMIT, value):
        raise ValueError(f"slurm.time: expected minutes, as 60, or days-hours:minutes:seconds, got {value!r:.200}")
    return value


def _seconds(limit: str) -> float:
    """Return what a time limit of Slurm's is in seconds."""
    if not limit[0].isdecimal():
        return math.inf
    days, dash, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    parts = parts if dash or len(parts) == 3 else [0, *parts]  # without days two are minutes and seconds
    hours, minutes, seconds = (*parts, 0, 0)[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def without_gpus(flag: str) -> str | None:
    """Return a flag of sbatch without the GPUs that it asks for; None where it asks for nothing else."""
    name, _, text = flag.partition("=")
    if name == "--gpus-per-node" or flag == "--gres=none":
        return None
    if name != "--gres":
        return flag
    others = [kind for kind in text.split(",") if _parts(kind)[0] != "gpu"]
    return f"--gres={','.join(others)}" if others else None


def _gpus(flag: str) -> list[int]:
    """Return how many GPUs of each kind a node is to have by --gres or --gpus-per-node, such as gpu:h100:4."""
    name, _, text = flag.partition("=")
    kinds = map(_parts, text.split(","))
    counts = [kind[-1] for kind in kinds if name == "--gpus-per-node" or (name == "--gres" and kind[0] == "gpu")]
    return [int(count) if count.isdecimal() else 1 for count in counts]


def _parts(kind: str) -> list[str]:
    return kind.removeprefix("gres/").removeprefix("gres:").split(":")


Time = Annotated[Name, BeforeValidator(_minutes), AfterValidator(_limit)]
Flag = Annotated[str, AfterValidator(_flag)]
Variable = Annotated[str, AfterValidator(_variable)]
Login = Annotated[Name, AfterValidator(_login)]


class SlurmConfig(Section):
    """What `astar launch` asks for. `slurm.backend` alone also says whether `astar train` submits or runs."""

    backend: Backend | None = None
    """What submits, for `astar train` outside a job too; `local`: stages run here. Null: sbatch, and training runs."""
    stages: list[Stage] | None = Field(default=None, min_length=1)
    """Each a job that begins when the one before it has succeeded; null: all but export, and sweep where it is read."""
    nodes: int = Field(default=1, ge=1, le=65536)
    """[nodes] Of training; sweep and evaluation get those that the engines need, export one. Spare ones come on top."""
    gpus_per_node: int = Field(default=8, ge=0, le=64)
    """[GPUs] Of each node; 0: the run computes on its cores."""
    account: Name | None = None
    """Slurm account; null: your default one."""
    partition: Name | None = None
    """Slurm partition; null: the cluster's default one."""
    time: Time | None = None
    """Time limit of each job, as 60 (minutes) or 1-12:00:00; null: the partition's."""
    flags: list[Flag] = Field(default=[])
    """More long flags of sbatch, as `--exclusive`; `--gres=gpu:...` or `--gpus-per-node=TYPE:N` ask for the GPUs."""
    image: Name | None = None
    """Container image (pyxis); null: no container."""
    mounts: list[Name] = Field(default=[])
    """What the container sees besides logs and the folder of submission, as `/data:/data`."""
    setup: str | None = Field(default=None, min_length=1)
    """A shell line that each node begins with, as `module load gcc`."""
    env: list[Variable] = Field(default=[])
    """More variables for the job, as `ASTAR_PYTHON=/opt/venv/bin/python`; no secrets: they would be in its script."""
    ssh: Login | None = None
    """The cluster's login node, as `me@login:/folder/of/jobs`; null: this machine. nemo-run only."""
    packager: Name | None = None
    """Code that travels with a job: `git` (what is committed) or a pattern of files; null: none. nemo-run only."""

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        for key, words in (("flags", self.flags), ("env", self.env)):
            names = [word.partition("=")[0] for word in words]
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(
                    f"slurm.{key}: {twice[0]} stands twice, of which one would be lost; make it one, as "
                    "--gres=gpu:8,nvme:1"
                )
        return self

    @model_validator(mode="after")
    def _time_for_work(self) -> Self:
        if self.time is not None and (problem := self.too_short(self.time)):
            raise ValueError(f"slurm.time: {problem}")
        least = next((flag.partition("=")[2] for flag in self.flags if flag.startswith("--time-min=")), None)
        if least is not None and (problem := self.too_short(least)):
            raise ValueError(f"slurm.flags: --time-min: {problem}")
        return self

    def too_short(self, limit: str) -> str | None:
        """Return what is wrong with a time limit that leaves none for work; None where it does."""
        flags = dict(flag.split("=", 1) for flag in self.flags if "=" in flag)
        notice = int(flags.get("--signal", f"@{NOTICE_SECONDS}").partition("@")[2])
        if _seconds(limit) > notice:
            return None
        return (
            f"{limit} is {_seconds(limit):.0f} s, and {notice} s before the limit jobs are asked to save and to end: "
            "they would be as they begin; raise it, or give less notice, as slurm.flags=['--signal=B:USR1@60']"
        )

    @model_validator(mode="after")
    def _gpus_as_planned(self) -> Self:
        for flag in self.gpu_flags:
            if flag != "--gres=none" and sum(_gpus(flag)) != self.gpus_per_node:
                raise ValueError(
                    f"slurm.flags: {flag}, but slurm.gpus_per_node={self.gpus_per_node}, by which the run is planned; "
                    "make both the same number"
                )
        return self

    @property
    def gpu_flags(self) -> list[str]:
        """Those of `flags` that ask for GPUs in their own way, or for none."""
        return [flag for flag in self.flags if flag == "--gres=none" or _gpus(flag)]

    @property
    def variables(self) -> dict[str, str]:
        """Those of `env`, by their names."""
        return dict(text.split("=", 1) for text in self.env)

    @property
    def spare_nodes(self) -> int:
        """How many nodes of each job preflight may leave out (slurm/train.sbatch)."""
        return int(self.variables.get("ASTAR_SPARE_NODES", "0"))
