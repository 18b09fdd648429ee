"""The stages of a run as one experiment of nemo-run, and what a user's own experiment is made of.

A stage is a run.Script that any executor runs: `python -m astar_megatron.cli train --config C`. On Slurm the executor's
`ray_template` is slurm/train.sbatch, so that it is the job's batch script: nemo-run's usual one would start it on
every node at once, without its signals, and nemo-run's Ray needs pyxis. (Its RayJob, of 0.11.1, takes no template.)
"""

import os
import re
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import nemo_run as run  # pyright: ignore[reportMissingImports]
from invoke.exceptions import UnexpectedExit  # pyright: ignore[reportMissingImports]
from nemo_run.core.execution.slurm import SlurmJobDetails  # pyright: ignore[reportMissingImports]
from paramiko.ssh_exception import SSHException  # pyright: ignore[reportMissingImports, reportMissingModuleSource]

from astar_megatron.cluster.placement import counted
from astar_megatron.config import ConfigError, RunConfig, SlurmConfig, load, without_gpus
from astar_megatron.launch import sbatch, scripts, slurm
from astar_megatron.launch.copies import with_copy
from astar_megatron.launch.stages import Job, jobs_of, names, title

_REFUSALS = (OSError, SSHException, UnexpectedExit, AssertionError)  # of nemo-run, and of what it asks


@dataclass(kw_only=True)
class BatchLog(SlurmJobDetails):
    """Where a job's own output goes: into its folder, which nemo-run makes. It does not make <job>/ray/logs."""

    @property
    def stdout(self) -> Path:
        """The file, in words of sbatch."""
        folder = Path(str(self.folder))
        return (folder.parents[1] if folder.parent.name == "ray" else folder) / f"log_{self.job_name}_%j.out"

    @property
    def ls_term(self) -> str:
        """What `logs` looks for."""
        return str(self.stdout).replace("%j", "*")


def script(words: Sequence[str], executor: Any, python: str = "python") -> Any:
    """Return the run.Script of `astar WORDS` for an executor; `python` is the one that has astar-megatron there.

    A SlurmExecutor's words go through a shell and are quoted for it; its own ASTAR_PYTHON says which Python. Others
    start no job of Slurm's, in which `astar train` would know that it is not to submit.
    """
    is_slurm = isinstance(executor, run.SlurmExecutor)
    quoted = [shlex.quote(word) for word in words] if is_slurm else [*words, "--set", "slurm.backend=local"]
    metadata = {"use_with_ray_cluster": True} if is_slurm else {}
    return run.Script(path="astar_megatron.cli", m=True, entrypoint=python, args=quoted, metadata=metadata)


@dataclass(kw_only=True)
class SetByHand(run.SlurmExecutor):
    """Fields of an executor that a command line sets; all others are those of the run's section slurm.

    Those that no user sets so stand for nothing set: Slurm has no job of 0 nodes, or of -1 GPUs.
    """

    nodes: int = 0
    time: str = ""
    gpus_per_node: int = -1  # its command line reads no `int | None`

    def over(self, executor: Any) -> Any:
        """Return another executor with these fields."""
        unset, changed = SetByHand(account=None), executor.clone()
        for field in fields(unset):
            value = getattr(self, field.name)
            if field.init and value != getattr(unset, field.name):
                setattr(changed, field.name, value)
        return changed


def slurm_executor(cfg: SlurmConfig, title: str, home: Path | None = None) -> Any:
    """Return the run.SlurmExecutor of the `slurm` section, whose batch script is slurm/train.sbatch.

    Its jobs are called `<title>-<stage>`. The template is written below `home`, by default NEMORUN_HOME.
    """
    variables = ({"ASTAR_SETUP": cfg.setup} if cfg.setup else {}) | cfg.variables
    tunnel, setup = run.LocalTunnel(job_dir=""), None
    if cfg.ssh:
        (user, host), job_dir = cfg.ssh.partition(":")[0].split("@"), cfg.ssh.partition(":")[2]
        tunnel = run.SSHTunnel(user=user, host=host, job_dir=job_dir)
        setup = f"cd {shlex.quote(job_dir)}"  # where relative paths begin, instead of the home folder
    folder = home or Path(run.config.get_nemorun_home())
    return run.SlurmExecutor(
        account=cfg.account,
        partition=cfg.partition,
        time=cfg.time,
        nodes=cfg.nodes + cfg.spare_nodes,
        gpus_per_node=None if cfg.gpu_flags else cfg.gpus_per_node or None,
        job_name_prefix=f"{title}-",
        container_image=cfg.image,
        container_mounts=list(cfg.mounts),
        env_vars={name: shlex.quote(value) for name, value in variables.items()},
        additional_parameters={"kill-on-invalid-dep": "yes"} | _parameters(cfg.flags),
        setup_lines=setup,
        tunnel=tunnel,
        packager=_packager(cfg.packager),
        job_details=BatchLog(),
        ray_template=str(scripts.write_ray_template(folder / "astar")),
        poll_estimated_start_time=False,
    )


def add_stages(
    experiment: Any, config_file: str, executor: Any, overrides: Sequence[str] = (), python: str = "python"
) -> list[str]:
    """Add the stages of a run to an experiment, each to begin when the one before it has succeeded.

    Returns the name of the last, which what comes after takes as `dependencies`. `slurm.stages` says which. Of a
    SlurmExecutor's nodes each gets those that it needs, and a copy of what was read here. `python` as in `script`.
    Raises ConfigError where the executor has fewer nodes or GPUs than the run was planned for.
    """
    cfg, last = load(config_file, overrides), []
    for job in jobs_of(cfg, config_file, overrides):
        own = executor.clone()
        if isinstance(own, run.SlurmExecutor):
            _check_holds(own, job)
            own.nodes, own.gpus_per_node = job.nodes, own.gpus_per_node if job.gpus_per_node else None
            if job.stage == "export":
                own.gres = _without_gpus("gres", own.gres)
                parameters = (own.additional_parameters or {}).items()
                kept = {name: _without_gpus(name, value) for name, value in parameters}
                own.additional_parameters = {name: value for name, value in kept.items() if value is not None}
            job = _with_shipped_copy(job, cfg, own)
        last = [experiment.add(script(job.command, own, python), own, name=job.stage, dependencies=last)]
    return last


def _with_shipped_copy(job: Job, cfg: RunConfig, executor: Any) -> Job:
    """Return the job with a copy of its configuration that comes to it as its code does.

    `git` ships the run's file itself, which is committed; what other packagers ship is the user's matter.
    """
    packager = executor.packager
    if type(packager) not in (run.Packager, run.PatternPackager):
        return job
    copied = with_copy(job, cfg, Path(executor.ray_template).parent)
    file, patterns, folders = Path(copied.config_file), [], []
    if isinstance(packager, run.PatternPackager):
        patterns, folders = _listed(packager.include_pattern), _listed(packager.relative_path)
    executor.packager = run.PatternPackager(
        include_pattern=[*patterns, str(file)], relative_path=[*folders, str(file.parent)]
    )
    return replace(copied, config_file=file.name)  # as it is called in the folder of that code


def _listed(paths: str | list[str]) -> list[str]:
    return [paths] if isinstance(paths, str) else paths


def _without_gpus(name: str, value: Any) -> Any:
    """The value of a flag without the GPUs that it asks for; None where it asks for nothing else, or is None."""
    if name not in ("gres", "gpus-per-node") or value is None:
        return value
    flag = without_gpus(f"--{name}={value}")
    return flag and flag.partition("=")[2]


def _check_holds(executor: Any, job: Job) -> None:
    for text in (executor.container_image or "", *executor.container_mounts):
        if not re.fullmatch(r"[\w./:,@#%+=-]*", text):
            raise ConfigError(
                f"slurm.image, slurm.mounts or the executor's: {text!r}: nemo-run's scripts take letters, digits and "
                ". _ - / : , @ # % + = alone; take a name of these"
            )
    gpus = executor.gpus_per_node
    for field, has, needed in (("nodes", executor.nodes, job.nodes), ("gpus_per_node", gpus, job.gpus_per_node)):
        if has is not None and has < needed:
            raise ConfigError(
                f"executor.{field}: {has}, but {job.stage} was planned for {needed}; raise it, or lower slurm.{field} "
                "in the run's file or its overrides"
            )


def submit(cfg: RunConfig, config_file: str, overrides: Sequence[str], *, dry_run: bool) -> None:
    """Submit the stages as one experiment; a dry run prints their batch scripts alone."""
    with tempfile.TemporaryDirectory(prefix="astar-launch-") as temporary:
        home = Path(temporary) if dry_run else None
        executor = slurm_executor(cfg.slurm, title(cfg), home)
        quiet = {"clean_mode": True, "log_level": "WARN", "enable_goodbye_message": False, "skip_status_at_exit": True}
        with run.Experiment(title(cfg), base_dir=home, **quiet) as experiment:
            add_stages(experiment, config_file, executor, overrides)
            if not dry_run:
                refuse_queued(cfg, executor)
                _run(experiment, executor)
                return
            experiment.dryrun(log=False, delete_exp_dir=False)
            before = ""
            for job in experiment.jobs:
                print(f"# {job.id}{before}\n{job._dryrun_info.request.materialize()}")
                before = f": begins when {job.id} has succeeded (afterok)"


def refuse_queued(cfg: RunConfig, executor: Any) -> None:
    """Raise ConfigError where Slurm has one of the run's jobs already, or can't be asked."""
    tunnel = executor.tunnel
    words = slurm.states_command(names(cfg), tunnel.user or slurm.user())  # a LocalTunnel has no user
    slurm.refuse_queued(_output_of(shlex.join(words), tunnel))


def _output_of(command: str, tunnel: Any, *, may_fail: bool = False) -> str:
    """Return what a command prints where the jobs are submitted. Raises ConfigError with its words where it fails."""
    try:
        return tunnel.run(command, warn=may_fail).stdout
    except _REFUSALS as error:
        raise ConfigError(f"the run's jobs can't be asked for: {_reason(error)}") from None


def clean_environment(executor: Any) -> None:
    """Take out of this process's environment what would win over the lines of the executor's batch scripts.

    And have jobs get the rest, although a site has set SBATCH_EXPORT=NONE.
    """
    named = vars(executor) | (getattr(executor, "additional_parameters", None) or {})
    kept = slurm.environment([name.replace("_", "-") for name, value in named.items() if value])
    for name in os.environ.keys() - kept.keys():
        del os.environ[name]
    os.environ["SBATCH_EXPORT"] = "ALL"


def _run(experiment: Any, executor: Any) -> None:
    """Submit all jobs or none. Raises ConfigError with the words of what refused one."""
    clean_environment(executor)
    try:
        experiment.run(detach=True)
    except _REFUSALS as error:
        numbers = [job.handle.split("/")[3] for job in experiment.jobs if job.handle]
        problem = _cancel(executor.tunnel, numbers)
        left = slurm.left(numbers, problem) if problem else "none is left"
        raise ConfigError(f"nemo-run could not submit the jobs: {_reason(error)}; {left}") from None
    for job in experiment.jobs:
        executor, number = job.executor, job.handle.split("/")[3]
        nodes, folder = counted(executor.nodes, "node"), f"{executor.tunnel.job_dir}/{job.id}"
        print(f"job {number}: {executor.job_name_prefix}{job.id} on {nodes}; {folder}")


def _cancel(tunnel: Any, numbers: Sequence[str]) -> str | None:
    """Cancel jobs; return what is in the way, None where nothing is."""
    try:
        if numbers:
            tunnel.run(f"scancel {' '.join(numbers)}")
    except _REFUSALS as error:
        return _reason(error)
    return None


def _reason(error: BaseException) -> str:
    result = getattr(error, "result", None)
    return f"{result.command}: {result.stderr.strip()}" if result is not None else f"{type(error).__name__}: {error}"


def look(cfg: RunConfig, action: str) -> None:
    """Print the status or the logs of the run's newest experiment, or cancel its jobs.

    Slurm is asked by the jobs' names: nemo-run's own status asks its accounting, which not every cluster has.
    """
    try:
        experiment = _newest(title(cfg))
    except (OSError, AssertionError, TypeError, ValueError, IndexError) as error:  # a damaged one too
        raise ConfigError(
            f"{run.config.get_nemorun_home()}: no experiment {title(cfg)} there that nemo-run can read "
            f"({_reason(error)}); set NEMORUN_HOME to what it was when it was launched"
        ) from None
    tunnel = experiment.jobs[0].executor.tunnel
    user = tunnel.user or slurm.user()  # a LocalTunnel has none
    if action == "cancel":
        if queued := slurm.waiting(_output_of(shlex.join(slurm.states_command(names(cfg), user)), tunnel)):
            _output_of(shlex.join(slurm.cancel_command(queued)), tunnel)
        print(slurm.cancelled(queued))
        commands = []
    elif action == "status":
        commands = [shlex.join(slurm.status_command(names(cfg), user))]
    else:
        commands = [_tail_of(job, shlex.quote(tunnel.job_dir)) for job in experiment.jobs]
    printed = [_output_of(command, tunnel, may_fail=action == "logs") for command in commands]
    print("".join(printed) or f"no job of the run has a log in {tunnel.job_dir} yet\n" * (action == "logs"), end="")
    tunnel.cleanup()


def _newest(title: str) -> Any:
    """The newest experiment that has submitted a job; the newest where none has: launches that were refused."""
    newest_first = map(run.Experiment.from_id, reversed(run.Experiment.catalog(title)))
    submitted = (experiment for experiment in newest_first if any(job.handle for job in experiment.jobs))
    return next(submitted, None) or run.Experiment.from_title(title)


def _tail_of(job: Any, folder: str) -> str:
    """What shows the ends of a job's logs: nothing and a failure where it has not begun. See scripts.py for where."""
    executor, own = job.executor, f"{folder}/{job.id}"
    logs = executor.env_vars.get("ASTAR_LOGS")  # as quoted for its script
    driver = f"{logs}/{executor.job_name_prefix}{job.id}" if logs else f"{own}/ray/logs"
    begin = f"{executor.setup_lines}; " if executor.setup_lines else ""  # into the folder of relative paths
    return f"{begin}tail -n {sbatch.SHOWN_LINES} {own}/log_*.out {driver}/driver-*.log"


def _packager(name: str | None) -> Any:
    if name is None:
        return run.Packager()
    if name == "git":
        return run.GitArchivePackager()
    return run.PatternPackager(include_pattern=str(Path(name).absolute()), relative_path=str(Path.cwd()))


def _parameters(flags: Sequence[str]) -> dict[str, Any]:
    """Return flags such as --exclusive and --qos=high as nemo-run takes them."""
    pairs = (flag.removeprefix("--").partition("=") for flag in flags)
    return {name: value if equals else True for name, equals, value in pairs}
