"""Slurm's commands: what asks for jobs by their names, and in which environment.

Variables that these commands read from it are left out where they would change what is submitted or who is asked for:
a job that was submitted inside another job, or under a name that nobody knows, could not be told from others.
"""

import os
import pwd
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from astar_megatron.config import ConfigError

_SECONDS = 120  # within which Slurm answers
# What a job is in before its end; a requeued one is in these too.
_BEFORE_THE_END = {
    *("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "COMPLETING", "STOPPED", "RESIZING", "SIGNALING"),
    *("REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT", "STAGE_OUT"),
}
# What a site or a user may set as a default for jobs, and the flags of sbatch that say otherwise. All other SBATCH_*
# would change what the batch script relies on.
_MEMORY = ("mem", "mem-per-gpu", "mem-per-cpu")
_DEFAULTS = {
    "SBATCH_ACCOUNT": ("account",),
    "SBATCH_PARTITION": ("partition",),
    "SBATCH_QOS": ("qos",),
    "SBATCH_RESERVATION": ("reservation",),
    "SBATCH_TIMELIMIT": ("time",),
    "SBATCH_CONSTRAINT": ("constraint",),
    "SBATCH_EXCLUSIVE": ("exclusive",),
    "SBATCH_WCKEY": ("wckey",),
    "SBATCH_MEM_PER_NODE": _MEMORY,
    "SBATCH_MEM_PER_GPU": _MEMORY,
}
_CLUSTER = {"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT"}  # which one, and the right to ask it


@dataclass(frozen=True, slots=True)
class QueuedJob:
    """A job as Slurm knows it."""

    number: str
    name: str
    state: str

    @property
    def has_ended(self) -> bool:
        return self.state not in _BEFORE_THE_END

    @property
    def did_well(self) -> bool:
        return self.state == "COMPLETED"


def environment(flags: Sequence[str] = ()) -> dict[str, str]:
    """Return this process's environment without what Slurm's commands must not read from it.

    `flags` are those of sbatch that stand in a batch script, where variables for the same would win over them.
    """
    dropped = ("SBATCH_", "SLURM_", "SQUEUE_", "SCANCEL_", "SRUN_")
    kept = {name for name, said_by in _DEFAULTS.items() if not {*said_by} & {*flags}} | _CLUSTER
    return {name: value for name, value in os.environ.items() if name in kept or not name.startswith(dropped)}


def user() -> str:
    """Return who Slurm takes this process's owner for, whatever LOGNAME says."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        raise ConfigError(f"user {os.getuid()} has no name on this machine, by which Slurm could be asked") from None


def status_command(names: Sequence[str], owner: str) -> list[str]:
    """Return what asks for a user's jobs by these names, old ones too as long as Slurm remembers them."""
    return ["squeue", *_by_names(names, owner), "--states=all", "--format=%i %j %T %M %D %R"]


def states_command(names: Sequence[str], owner: str) -> list[str]:
    """Return what asks for the numbers, names and states of the same jobs alone."""
    return ["squeue", *_by_names(names, owner), "--states=all", "--noheader", "--format=%i %j %T"]


def jobs_in(printed: str) -> list[QueuedJob]:
    """Return the jobs that `states_command` has printed, whatever a site adds to that."""
    return [QueuedJob(*words) for words in re.findall(r"^(\d\S*) (\S+) ([A-Z_]+)$", printed, re.MULTILINE)]


def cancel_command(queued: Sequence[QueuedJob]) -> list[str]:
    """Return what cancels jobs."""
    return ["scancel", *(job.number for job in queued)]


def cancel(names: Sequence[str]) -> list[QueuedJob]:
    """Cancel the jobs by these names that have not ended, and return them."""
    if queued := waiting(output_of(states_command(names, user()))):
        output_of(cancel_command(queued))
    return queued


def cancelled(queued: Sequence[QueuedJob]) -> str:
    """Return in words what was cancelled."""
    jobs = (f"cancelled job {job.number}: {job.name}" for job in queued)
    return "\n".join(jobs) or "none of the run's jobs waits or runs"


def left(numbers: Sequence[str], why: object) -> str:
    """Return in words which jobs could not be cancelled, and how to do that."""
    return f"left in the queue, for it could not be cancelled ({why}): do scancel {' '.join(numbers)}"


def _by_names(names: Sequence[str], owner: str) -> tuple[str, str]:
    return f"--user={owner}", f"--name={','.join(names)}"


def waiting(printed: str) -> list[QueuedJob]:
    """Return those of the jobs that `states_command` has printed that have not ended."""
    return [job for job in jobs_in(printed) if not job.has_ended]


def refuse_queued(printed: str) -> None:
    """Raise ConfigError where `states_command` has printed a job before its end: two would write into one folder."""
    for job in waiting(printed):
        raise ConfigError(
            f"slurm: job {job.number}, {job.name}, is {job.state} already; cancel it (astar jobs cancel), wait for its "
            "end, or take another run_dir"
        )


def output_of(words: Sequence[str], variables: Mapping[str, str] | None = None) -> str:
    """Return what a command of Slurm prints, with more variables. Raises ConfigError with its words if it refuses."""
    own = environment() | dict(variables or {})
    try:
        program = shutil.which(words[0]) or words[0]  # by this process's PATH: `variables` may have that of the jobs
        command = [program, *words[1:]]
        done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except FileNotFoundError:
        raise ConfigError(f"{words[0]}: not here; run this on a login node") from None
    except subprocess.TimeoutExpired:
        raise ConfigError(f"{words[0]}: no answer in {_SECONDS} s; is Slurm up?") from None
    if done.returncode:
        raise ConfigError(f"{shlex.join(words)}: {done.stderr.strip() or f'status {done.returncode}'}")
    return done.stdout
