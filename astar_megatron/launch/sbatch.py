"""Jobs by plain sbatch, each after the one before it, and the stages one after the other on this machine.

Jobs are known by their names, so nothing has to be kept: `status` and `cancel` ask Slurm, `logs` looks at the files.
"""

import functools
import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from astar_megatron.cluster.placement import counted
from astar_megatron.cluster.processes import die_with
from astar_megatron.cluster.signals import PassedOn
from astar_megatron.config import ConfigError, SlurmConfig, without_gpus
from astar_megatron.launch import scripts, slurm
from astar_megatron.launch.stages import Job

SHOWN_LINES = 40
_STACK = ("torch", "megatron", "vllm")  # of an environment that trains; Ray is in that of nemo-run too


def variables(job: Job, cfg: SlurmConfig) -> dict[str, str]:
    """Return what the job's script reads from its environment (the head of slurm/train.sbatch)."""
    chosen = {
        "ASTAR_PROGRAM": job.stage,
        "ASTAR_IMAGE": cfg.image,
        "ASTAR_MOUNTS": ",".join(cfg.mounts),
        "ASTAR_SETUP": cfg.setup,
    }
    if cfg.image is None and all(map(importlib.util.find_spec, _STACK)):  # it can run what it launches
        chosen["ASTAR_PYTHON"] = sys.executable  # and may be on no PATH
    own = cfg.variables
    if "ASTAR_LOGS" in own:
        own["ASTAR_LOGS"] = f"{own['ASTAR_LOGS']}/{job.name}"  # stages don't write into each other's files
    return {name: value for name, value in chosen.items() if value} | own


def say_python(job: Job, cfg: SlurmConfig) -> None:
    """Say, on stderr, that jobs run whatever python3 the nodes have, where nothing names another."""
    if not (cfg.image or cfg.setup or "ASTAR_PYTHON" in variables(job, cfg) or Path(".venv/bin/python").exists()):
        print(
            "astar: jobs run the python3 of their nodes, as this environment has no torch and here is no .venv; "
            "another is named by slurm.env=[ASTAR_PYTHON=/path/to/python]",
            file=sys.stderr,
        )


def logs_folder(cfg: SlurmConfig) -> Path:
    """Return where the jobs' own output goes."""
    return Path(cfg.variables.get("ASTAR_LOGS", "logs"))


def copies_folder(job: Job, cfg: SlurmConfig) -> Path:
    """Return where the copy of the configuration that a job reads lies: a folder that its container sees."""
    return Path(variables(job, cfg).get("ASTAR_LOGS", logs_folder(cfg)))


def command(job: Job, cfg: SlurmConfig, after: str | None) -> list[str]:
    """Return the words of sbatch; `after` is the number of the job that must have succeeded."""
    flags = {
        "export": "ALL",  # what the script reads, although a site has set SBATCH_EXPORT=NONE
        "job-name": job.name,
        "nodes": job.nodes,
        "gpus-per-node": None if cfg.gpu_flags else job.gpus_per_node or None,
        "account": cfg.account,
        "partition": cfg.partition,
        "time": cfg.time,
        "output": logs_folder(cfg) / "%x-%j.log",
        "dependency": f"afterok:{after}" if after else None,
        "kill-on-invalid-dep": "yes" if after else None,
    }
    words = [f"--{flag}={value}" for flag, value in flags.items() if value is not None]
    more = filter(None, map(without_gpus, cfg.flags)) if job.stage == "export" else cfg.flags
    return ["sbatch", "--parsable", *words, *more, str(scripts.path("train.sbatch")), job.config_file, *job.words]


def submit(jobs: Sequence[Job], cfg: SlurmConfig, names: Sequence[str], *, dry_run: bool) -> None:
    """Submit all the jobs in their order, or none, and say their numbers.

    A dry run prints the commands and their batch script. Raises ConfigError where Slurm refuses, or has a job by one of
    `names`, those of all stages of the run.
    """
    if dry_run:
        for before, job in zip((None, *jobs), jobs, strict=False):
            print(_shown(variables(job, cfg), command(job, cfg, before and f"<number of {before.name}>")))
        script = scripts.path("train.sbatch")
        print(f"\n# {script}, which each of them runs:\n{script.read_text(encoding='utf-8')}", end="")
        return
    slurm.refuse_queued(slurm.output_of(slurm.states_command(names, slurm.user())))
    numbers: list[str] = []
    try:
        for job in jobs:
            numbers.append(submit_job(job, cfg, numbers[-1] if numbers else None))
    except BaseException:
        try:
            slurm.cancel(names)  # by name: one may be there whose number nobody has said
        except ConfigError as error:
            if numbers:
                print(f"astar: {slurm.left(numbers, error)}", file=sys.stderr)
        raise
    for job, number in zip(jobs, numbers, strict=True):
        print(f"job {number}: {job.name} on {counted(job.nodes, 'node')}; {logs_folder(cfg)}/{job.name}-{number}.log")


def submit_job(job: Job, cfg: SlurmConfig, after: str | None) -> str:
    """Return the number of a job that is submitted, after one that must have succeeded. Raises ConfigError."""
    printed = slurm.output_of(command(job, cfg, after), variables(job, cfg))
    numbers = re.findall(r"^(\d+)(?:;.*)?$", printed, re.MULTILINE)  # sites have sbatch greet
    if not numbers:
        raise ConfigError(f"sbatch: no line that is the number of a job, for {job.name}: {printed.strip()!r:.500}")
    return numbers[-1]


def run_here(jobs: Sequence[Job], cfg: SlurmConfig, *, dry_run: bool) -> int:
    """Run the stages one after the other until one fails or a signal asks for the end; return the last exit status."""
    commands = [["bash", str(scripts.path("train.sbatch")), job.config_file, *job.words] for job in jobs]
    if dry_run:
        for job, words in zip(jobs, commands, strict=True):
            print(_shown(variables(job, cfg), words))
        return 0
    signals = PassedOn()
    end_with_this = functools.partial(die_with, os.getpid(), signal.SIGTERM)  # which may be killed
    for job, words in zip(jobs, commands, strict=True):
        if signals.asked:
            print(f"asked to end before {job.name} has begun; the same command goes on", file=sys.stderr)
            return signals.exit_status(-signals.asked)
        # In this group: slurm.setup may ask at the terminal, and the terminal's end is the stage's.
        process = subprocess.Popen(words, env=slurm.environment() | variables(job, cfg), preexec_fn=end_with_this)
        if status := signals.exit_status(signals.wait(process)):
            print(f"{job.name} ended with status {status}; what comes after it is not run", file=sys.stderr)
            return status
    return 0


def status(names: Sequence[str]) -> None:
    """Print what Slurm knows of the jobs that are called so."""
    print(slurm.output_of(slurm.status_command(names, slurm.user())), end="")


def cancel(names: Sequence[str]) -> None:
    """Cancel those that wait or run, and say which."""
    print(slurm.cancelled(slurm.cancel(names)))


def logs(names: Sequence[str], cfg: SlurmConfig) -> None:
    """Print the end of the newest output of each job that has one, the job's own and the program's."""
    folder = logs_folder(cfg)
    newest = {name: max(folder.glob(f"{name}-*.log"), key=_written, default=None) for name in names}
    if not any(newest.values()):
        print(f"no job of the run has a log in {folder} yet; those of nemo-run: --set slurm.backend=nemo-run")
    for name, own in newest.items():
        if own is None:
            continue
        number = own.stem.rpartition("-")[2]
        below = Path(f"{cfg.variables['ASTAR_LOGS']}/{name}") if "ASTAR_LOGS" in cfg.variables else None
        for file in (own, *sorted((below or folder / f"slurm-{number}").glob("driver-*.log"))):
            print(f"--- {file}")
            print("\n".join(file.read_text(encoding="utf-8", errors="replace").splitlines()[-SHOWN_LINES:]))


def _written(file: Path) -> float:
    return file.stat().st_mtime


def _shown(chosen: dict[str, str], words: Sequence[str]) -> str:
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in chosen.items()), shlex.join(words)])
