"""Jobs by plain sbatch, each after the one before it, and the stages one after the other on this machine.

Jobs are known by their names, so nothing has to be kept: `status` and `cancel` ask Slurm, `logs` looks at the files.
"""

import getpass
import importlib.util
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from astar_megatron.cluster.placement import counted
from astar_megatron.config import ConfigError, SlurmConfig
from astar_megatron.launch import scripts
from astar_megatron.launch.stages import Job

SHOWN_LINES = 40
_SECONDS = 120  # within which Slurm answers


def variables(job: Job, cfg: SlurmConfig) -> dict[str, str]:
    """Return what the job's script reads from its environment (the head of slurm/train.sbatch)."""
    chosen = {
        "ASTAR_PROGRAM": job.stage,
        "ASTAR_IMAGE": cfg.image,
        "ASTAR_MOUNTS": ",".join(cfg.mounts),
        "ASTAR_SETUP": cfg.setup,
    }
    if cfg.image is None and importlib.util.find_spec("ray"):  # it can run what it launches, and may be on no PATH
        chosen["ASTAR_PYTHON"] = sys.executable
    own = cfg.variables
    if "ASTAR_LOGS" in own:
        own["ASTAR_LOGS"] = f"{own['ASTAR_LOGS']}/{job.name}"  # stages don't write into each other's files
    return {name: value for name, value in chosen.items() if value} | own


def logs_folder(cfg: SlurmConfig) -> Path:
    """Return where the jobs' own output goes."""
    return Path(cfg.variables.get("ASTAR_LOGS", "logs"))


def command(job: Job, cfg: SlurmConfig, after: str | None) -> list[str]:
    """Return the words of sbatch; `after` is the number of the job that must have succeeded."""
    flags = {
        "export": "ALL",  # what the script reads, although a site has set SBATCH_EXPORT=NONE
        "job-name": job.name,
        "nodes": job.nodes,
        "gpus-per-node": job.gpus_per_node or None,
        "account": cfg.account,
        "partition": cfg.partition,
        "time": cfg.time,
        "output": logs_folder(cfg) / "%x-%j.log",
        "dependency": f"afterok:{after}" if after else None,
        "kill-on-invalid-dep": "yes" if after else None,
    }
    words = [f"--{flag}={value}" for flag, value in flags.items() if value is not None]
    return ["sbatch", "--parsable", *words, *cfg.flags, str(scripts.path("train.sbatch")), job.config_file, *job.words]


def submit(jobs: Sequence[Job], cfg: SlurmConfig, *, dry_run: bool) -> None:
    """Submit all the jobs in their order, or none, and say their numbers.

    A dry run prints the commands and their batch script. Raises ConfigError where Slurm refuses, or has one already.
    """
    if dry_run:
        for before, job in zip((None, *jobs), jobs, strict=False):
            print(_shown(variables(job, cfg), command(job, cfg, before and f"<number of {before.name}>")))
        script = scripts.path("train.sbatch")
        print(f"\n# {script}, which each of them runs:\n{script.read_text(encoding='utf-8')}", end="")
        return
    refuse_queued(output_of(queued_command(jobs, getpass.getuser())))
    numbers: list[str] = []
    for job in jobs:
        try:
            numbers.append(submit_job(job, cfg, numbers[-1] if numbers else None))
        except ConfigError:
            if numbers:
                output_of(["scancel", *numbers])
            raise
    for job, number in zip(jobs, numbers, strict=True):
        print(f"job {number}: {job.name} on {counted(job.nodes, 'node')}; {logs_folder(cfg)}/{job.name}-{number}.log")


def submit_job(job: Job, cfg: SlurmConfig, after: str | None) -> str:
    """Return the number of a job that is submitted, after one that must have succeeded. Raises ConfigError."""
    return output_of(command(job, cfg, after), os.environ | variables(job, cfg)).strip().partition(";")[0]


def run_here(jobs: Sequence[Job], cfg: SlurmConfig, *, dry_run: bool) -> int:
    """Run the stages one after the other until one fails; return the last exit status."""
    for job in jobs:
        chosen = variables(job, cfg)
        words = ["bash", str(scripts.path("train.sbatch")), job.config_file, *job.words]
        if dry_run:
            print(_shown(chosen, words))
        elif status := subprocess.run(words, env=os.environ | chosen, check=False).returncode:
            print(f"{job.name} ended with status {status}; what comes after it is not run", file=sys.stderr)
            return status
    return 0


def status_command(jobs: Sequence[Job], user: str) -> list[str]:
    """Return what asks Slurm for a user's jobs by these names, old ones too as long as it remembers them."""
    return ["squeue", *_by_names(jobs, user), "--states=all", "--format=%i %j %T %M %D %R"]


def states_command(jobs: Sequence[Job], user: str) -> list[str]:
    """Return what asks Slurm for the numbers, names and states of the same jobs alone."""
    return ["squeue", *_by_names(jobs, user), "--states=all", "--noheader", "--format=%i %j %T"]


def queued_command(jobs: Sequence[Job], user: str) -> list[str]:
    """Return what asks Slurm for a user's jobs by these names that wait or run."""
    states = "PENDING,CONFIGURING,RUNNING,SUSPENDED"
    return ["squeue", *_by_names(jobs, user), f"--states={states}", "--noheader", "--format=%i %j %T"]


def _by_names(jobs: Sequence[Job], user: str) -> tuple[str, str]:
    return f"--user={user}", f"--name={','.join(job.name for job in jobs)}"


def refuse_queued(printed: str) -> None:
    """Raise ConfigError where the command above has printed a job: two would write into one run's folder."""
    if lines := printed.split("\n")[0].split():
        number, name, state = lines
        raise ConfigError(
            f"slurm: job {number}, {name}, is {state} already; cancel it (astar jobs cancel), wait for its end, or "
            "take another run_dir"
        )


def cancel_command(job: Job, user: str) -> list[str]:
    """Return what cancels a user's jobs by a name that wait or run."""
    return ["scancel", f"--user={user}", f"--name={job.name}"]


def status(jobs: Sequence[Job]) -> None:
    """Print what Slurm knows of the jobs."""
    print(output_of(status_command(jobs, getpass.getuser())), end="")


def cancel(jobs: Sequence[Job]) -> None:
    """Cancel those that wait or run."""
    for job in jobs:
        output_of(cancel_command(job, getpass.getuser()))


def logs(jobs: Sequence[Job], cfg: SlurmConfig) -> None:
    """Print the end of the newest output of each stage, the job's own and the program's."""
    for job in jobs:
        own = max(logs_folder(cfg).glob(f"{job.name}-*.log"), key=lambda file: file.stat().st_mtime, default=None)
        if own is None:
            print(f"{job.name}: no log in {logs_folder(cfg)} yet")
            continue
        number = own.stem.rpartition("-")[2]
        below = Path(variables(job, cfg).get("ASTAR_LOGS", logs_folder(cfg) / f"slurm-{number}"))
        for file in (own, *sorted(below.glob("driver-*.log"))):
            print(f"--- {file}")
            print("\n".join(file.read_text(encoding="utf-8", errors="replace").splitlines()[-SHOWN_LINES:]))


def output_of(words: Sequence[str], environment: dict[str, str] | None = None) -> str:
    """Return what a command of Slurm prints. Raises ConfigError with its words where it refuses."""
    try:
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except FileNotFoundError:
        raise ConfigError(f"{words[0]}: not here; run this on a login node") from None
    except subprocess.TimeoutExpired:
        raise ConfigError(f"{words[0]}: no answer in {_SECONDS} s; is Slurm up?") from None
    if done.returncode:
        raise ConfigError(f"{shlex.join(words)}: {done.stderr.strip() or f'status {done.returncode}'}")
    return done.stdout


def _shown(chosen: dict[str, str], words: Sequence[str]) -> str:
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in chosen.items()), shlex.join(words)])
