"""Slurm's commands: what asks for jobs by their names, and in which environment.

Variables that these commands read from it are left out where they would change what is submitted or who is asked for:
a job that was submitted inside another job, or under a name that nobody knows, could not be told from others.
"""

import os
import pwd
import shlex
import subprocess
from collections.abc import Mapping, Sequence

from astar_megatron.config import ConfigError

_SECONDS = 120  # within which Slurm answers
_IN_THE_QUEUE = "PENDING,CONFIGURING,RUNNING,SUSPENDED,COMPLETING,REQUEUED,REQUEUE_HOLD,STOPPED"
# What a site or a user may set as a default for jobs: all other SBATCH_* would change what the batch script relies on.
_DEFAULTS = {
    *("SBATCH_ACCOUNT", "SBATCH_PARTITION", "SBATCH_QOS", "SBATCH_RESERVATION", "SBATCH_CLUSTERS", "SBATCH_TIMELIMIT"),
    *("SBATCH_CONSTRAINT", "SBATCH_EXCLUSIVE", "SBATCH_WCKEY", "SBATCH_MEM_PER_NODE", "SBATCH_MEM_PER_GPU"),
}
_CLUSTER = {"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT"}  # which one, and the right to ask it


def environment() -> dict[str, str]:
    """Return this process's environment without what Slurm's commands must not read from it."""
    dropped = ("SBATCH_", "SLURM_", "SQUEUE_", "SCANCEL_", "SRUN_")
    return {
        name: value
        for name, value in os.environ.items()
        if name in _DEFAULTS | _CLUSTER or not name.startswith(dropped)
    }


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


def queued_command(names: Sequence[str], owner: str) -> list[str]:
    """Return what asks for those of them that wait, run or are about to end."""
    return ["squeue", *_by_names(names, owner), f"--states={_IN_THE_QUEUE}", "--noheader", "--format=%i %j %T"]


def cancel_command(queued: str) -> list[str]:
    """Return what cancels the jobs that `queued_command` has printed."""
    return ["scancel", *(line.split()[0] for line in queued.splitlines())]


def cancel(names: Sequence[str]) -> str:
    """Cancel the jobs by these names that wait or run; return what `queued_command` had printed of them."""
    if queued := output_of(queued_command(names, user())):
        output_of(cancel_command(queued))
    return queued


def cancelled(queued: str) -> str:
    """Return in words what was cancelled: the jobs that `queued_command` had printed."""
    jobs = (f"cancelled job {number}: {name}" for number, name, _ in map(str.split, queued.splitlines()))
    return "\n".join(jobs) or "none of the run's jobs waits or runs"


def _by_names(names: Sequence[str], owner: str) -> tuple[str, str]:
    return f"--user={owner}", f"--name={','.join(names)}"


def refuse_queued(printed: str) -> None:
    """Raise ConfigError where `queued_command` has printed a job: two would write into one run's folder."""
    if lines := printed.split("\n")[0].split():
        number, name, state = lines
        raise ConfigError(
            f"slurm: job {number}, {name}, is {state} already; cancel it (astar jobs cancel), wait for its end, or "
            "take another run_dir"
        )


def output_of(words: Sequence[str], variables: Mapping[str, str] | None = None) -> str:
    """Return what a command of Slurm prints, with more variables. Raises ConfigError with its words if it refuses."""
    own = environment() | dict(variables or {})
    try:
        done = subprocess.run(words, env=own, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except FileNotFoundError:
        raise ConfigError(f"{words[0]}: not here; run this on a login node") from None
    except subprocess.TimeoutExpired:
        raise ConfigError(f"{words[0]}: no answer in {_SECONDS} s; is Slurm up?") from None
    if done.returncode:
        raise ConfigError(f"{shlex.join(words)}: {done.stderr.strip() or f'status {done.returncode}'}")
    return done.stdout
