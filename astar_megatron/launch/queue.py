"""Commands as jobs of Slurm's, side by side, until each has ended.

Jobs are known by their names (stages.py), so who asks again for what still waits or runs gets the job that is there.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from astar_megatron.config import ConfigError, RunConfig, SlurmConfig, Stage
from astar_megatron.launch import checks, sbatch, slurm
from astar_megatron.launch.stages import Job, jobs_of

POLL_SECONDS = 15.0
_DONE = "COMPLETED"
# What a job is in before its end; a requeued one is in these too.
_BEFORE_THE_END = (
    *("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "COMPLETING", "STOPPED", "RESIZING", "SIGNALING"),
    *("REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT", "STAGE_OUT"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A job, what it asks Slurm for, and the file that gets what it says."""

    job: Job
    cfg: SlurmConfig
    log: Path


def submission_of(cfg: RunConfig, stage: Stage, file: Path, log: Path) -> Submission:
    """Return the job that runs a stage of a configuration, which lies in a file."""
    own = cfg.slurm.model_copy(update={"stages": [stage]})
    (job,) = jobs_of(cfg.model_copy(update={"slurm": own}), str(file))
    return Submission(job=job, cfg=own, log=log)


def check(cfg: RunConfig, stage: Stage) -> None:
    """Raise ConfigError or PlacementError for what would keep a job from being submitted."""
    if cfg.slurm.backend != "sbatch":
        raise ConfigError(f"slurm.backend: {cfg.slurm.backend} submits one run; for many take sbatch or local")
    checks.of_environment()
    checks.of_sbatch(cfg.slurm, dry_run=False)
    submission_of(cfg, stage, Path(), Path())


def ended(submissions: Mapping[str, Submission], poll_seconds: float = POLL_SECONDS) -> Iterator[tuple[str, bool]]:
    """Submit what is not in the queue; yield the key of each job when it has ended, and whether it did well.

    Raises ConfigError where Slurm refuses one: those before it stay in the queue.
    """
    jobs = {key: submission.job for key, submission in submissions.items()}
    numbers: dict[str, str] = {}
    queued = {name: number for number, (name, state) in _states(jobs).items() if state in _BEFORE_THE_END}
    for key, job in jobs.items():
        numbers[key] = queued.get(job.name) or _submit(submissions[key])
        print(f"job {numbers[key]}: {job.name}, log in {submissions[key].log}")
    while numbers:
        states = _states({key: jobs[key] for key in numbers})
        for key, number in list(numbers.items()):
            _, state = states.get(number, ("", "no longer known"))
            if state not in _BEFORE_THE_END:
                del numbers[key]
                yield key, state == _DONE
        if numbers:
            time.sleep(poll_seconds)


def _submit(submission: Submission) -> str:
    """Return the number of a job whose own output is added to the log."""
    output = [f"--output={submission.log}", "--open-mode=append"]
    cfg = submission.cfg.model_copy(update={"flags": [*submission.cfg.flags, *output]})
    return sbatch.submit_job(submission.job, cfg, None)


def _states(jobs: Mapping[str, Job]) -> dict[str, tuple[str, str]]:
    """Return by number the names of a user's jobs that are called as these, and what they are in."""
    printed = slurm.output_of(slurm.states_command([job.name for job in jobs.values()], slurm.user()))
    lines = (line.split() for line in printed.splitlines())
    return {number: (name, state) for number, name, state in lines}
