"""Commands as jobs of Slurm's, side by side, until each has ended.

Jobs are known by their names (stages.py), so who asks again for what still waits or runs gets the job that is there.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from astar_megatron.config import ConfigError, RunConfig, SlurmConfig, Stage
from astar_megatron.launch import checks, sbatch, slurm
from astar_megatron.launch.copies import with_copy
from astar_megatron.launch.stages import Job, jobs_of

POLL_SECONDS = 15.0
_MOST_FAILURES = 40  # to answer in a row, ten minutes: a controller that restarts is back before


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A job, what it asks Slurm for, and the file that gets what it says."""

    job: Job
    cfg: SlurmConfig
    log: Path


def submission_of(cfg: RunConfig, stage: Stage, log: Path) -> Submission:
    """Return the job that runs a stage of a configuration, a copy of which is written beside the log."""
    return Submission(job=with_copy(_job(cfg, stage), cfg, log.parent), cfg=cfg.slurm, log=log)


def _job(cfg: RunConfig, stage: Stage) -> Job:
    own = cfg.slurm.model_copy(update={"stages": [stage]})
    (job,) = jobs_of(cfg.model_copy(update={"slurm": own}), "")
    return job


def check(cfg: RunConfig, stage: Stage) -> None:
    """Raise ConfigError or PlacementError for what would keep a job from being submitted."""
    if cfg.slurm.backend != "sbatch":
        raise ConfigError(f"slurm.backend: {cfg.slurm.backend} submits one run; for many take sbatch or local")
    checks.of_environment(cfg.slurm)
    checks.of_sbatch(cfg.slurm, dry_run=False)
    checks.of_log(Path(cfg.run_dir), "choose another folder for its runs")
    _job(cfg, stage)


def ended(submissions: Mapping[str, Submission], poll_seconds: float = POLL_SECONDS) -> Iterator[tuple[str, bool]]:
    """Submit what is not in the queue; yield the key of each job when it has ended, and whether it did well.

    Raises ConfigError where Slurm refuses one, those before it stay in the queue, and where it answers no more.
    """
    jobs = {key: submission.job for key, submission in submissions.items()}
    numbers: dict[str, str] = {}
    queued = {job.name: job.number for job in _known(jobs) if not job.has_ended}
    for key, job in jobs.items():
        numbers[key] = queued.get(job.name) or _submit(submissions[key])
        print(f"job {numbers[key]}: {job.name}, log in {submissions[key].log}")
    while numbers:
        known = {job.number: job for job in _answer({key: jobs[key] for key in numbers}, poll_seconds)}
        for key, number in list(numbers.items()):
            job = known.get(number)  # None: Slurm has forgotten it
            if job is None or job.has_ended:
                del numbers[key]
                yield key, job is not None and job.did_well
        if numbers:
            time.sleep(poll_seconds)


def _submit(submission: Submission) -> str:
    """Return the number of a job whose own output is added to the log."""
    output = [f"--output={submission.log}", "--open-mode=append"]
    cfg = submission.cfg.model_copy(update={"flags": [*submission.cfg.flags, *output]})
    return sbatch.submit_job(submission.job, cfg, None)


def _known(jobs: Mapping[str, Job]) -> list[slurm.QueuedJob]:
    """Return what Slurm knows of a user's jobs that are called as these."""
    names = [job.name for job in jobs.values()]
    return slurm.jobs_in(slurm.output_of(slurm.states_command(names, slurm.user())))


def _answer(jobs: Mapping[str, Job], poll_seconds: float) -> list[slurm.QueuedJob]:
    """As `_known`, but asks again while Slurm does not answer."""
    num_failures = 0
    while True:
        try:
            return _known(jobs)
        except ConfigError as error:
            num_failures += 1
            if num_failures == _MOST_FAILURES:
                takes_over = "the jobs go on without this command, which takes them over when run again"
                raise ConfigError(f"{error}; {takes_over}") from None
            if num_failures == 1:
                print(f"{error}; the jobs go on, and Slurm is asked again every {poll_seconds:g} s")
            time.sleep(poll_seconds)
