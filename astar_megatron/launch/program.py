"""PROGRAM: `astar launch` submits the stages of a run, `astar jobs` looks at them; a backend is chosen once, here."""

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from astar_megatron.config import ConfigError, RunConfig, SlurmConfig
from astar_megatron.launch import checks, sbatch
from astar_megatron.launch.copies import with_copy
from astar_megatron.launch.stages import jobs_of, names

_ACTIONS = ("status", "logs", "cancel")


def submits(cfg: SlurmConfig) -> bool:
    """Whether `astar train` is to submit the run, instead of running in this process: never in a job."""
    return cfg.backend not in (None, "local") and "SLURM_JOB_ID" not in os.environ


def launch(cfg: RunConfig, config_file: Path, overrides: Sequence[str], *, dry_run: bool) -> int:
    """Submit the stages, or print what would be; return the exit status. Nothing is submitted where one is refused."""
    checks.of_environment(cfg.slurm)
    jobs = jobs_of(cfg, str(config_file), overrides)
    if not dry_run:
        checks.of_inputs(cfg, [job.stage for job in jobs])
    if cfg.slurm.backend == "nemo-run":
        checks.of_nemo_run(cfg, str(config_file))
    else:
        checks.of_sbatch(cfg.slurm, dry_run=dry_run)
        sbatch.say_python(jobs[0], cfg.slurm)
    if dry_run and cfg.slurm.packager != "git":
        print("# Nothing is written. What --config names would be a copy of what was checked here")
    if cfg.slurm.backend == "nemo-run":
        _nemo().submit(cfg, str(config_file), overrides, dry_run=dry_run)
        return 0
    jobs = [with_copy(job, cfg, sbatch.copies_folder(job, cfg.slurm), dry_run=dry_run) for job in jobs]
    if cfg.slurm.backend == "local":
        return sbatch.run_here(jobs, cfg.slurm, dry_run=dry_run)
    sbatch.submit(jobs, cfg.slurm, names(cfg), dry_run=dry_run)
    return 0


def look(cfg: RunConfig, action: str) -> None:
    """Print the status or the logs of the run's jobs, or cancel them."""
    if action not in _ACTIONS:
        raise ConfigError(f"astar jobs {action}: expected status, logs or cancel")
    if cfg.slurm.backend == "local":
        raise ConfigError("slurm.backend: local runs in the terminal that started it; there are no jobs")
    if cfg.slurm.backend == "nemo-run":
        _nemo().look(cfg, action)
    elif action == "logs":
        sbatch.logs(names(cfg), cfg.slurm)
    elif action == "status":
        sbatch.status(names(cfg))
    else:
        sbatch.cancel(names(cfg))


def _nemo() -> Any:
    try:
        return importlib.import_module("astar_megatron.launch.nemo")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"slurm.backend: nemo-run needs {error.name}, which is not installed: pip install 'astar-megatron[launch]' "
            "in an environment of its own, or set slurm.backend=sbatch"
        ) from None
