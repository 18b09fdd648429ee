"""`nemorun astar experiment config=FILE`: the stages of a run, the way of nemo-run.

nemo-run loads this file by the entry point `nemo_run.cli`. Without `run.executor` the jobs are those of the file's
section slurm; with `run.executor=slurm` the command line sets fields of their executor, as run.executor.nodes=4.
"""

from typing import Any

import nemo_run as run  # pyright: ignore[reportMissingImports]

from astar_megatron.config import load
from astar_megatron.launch import checks, nemo
from astar_megatron.launch.stages import jobs_of, title


@run.cli.entrypoint(namespace="astar", type="experiment")
def experiment(
    ctx: run.cli.RunContext,
    config: str,
    overrides: list[str] = [],  # noqa: B006 (nemo-run's command line has no word for other types; nobody changes it)
    python: str = "python",
) -> None:
    """The stages of a run, one after the other; `overrides` are words such as optim.lr=1e-6."""
    cfg = load(config, overrides)
    checks.of_environment(cfg.slurm)
    executor = ctx.executor or nemo.SetByHand(account=None)
    if isinstance(executor, run.SlurmExecutor):  # before anything is written
        checks.of_nemo_run(cfg, config)
    if isinstance(executor, nemo.SetByHand):
        executor = executor.over(nemo.slurm_executor(cfg.slurm, title(cfg)))
    if isinstance(executor, run.SlurmExecutor) and not ctx.dryrun:
        if executor.container_image is None:  # the command line may name one
            checks.of_inputs(cfg, [job.stage for job in jobs_of(cfg, config, overrides)])
        nemo.refuse_queued(cfg, executor)
    nemo.clean_environment(executor)
    with run.Experiment(title(cfg)) as stages:
        nemo.add_stages(stages, config, executor, overrides, python)
        ctx.executor = executor  # without one nemo-run would run everything in this process
        ctx.launch(stages)


@run.cli.factory(target=experiment)
def recipe(config: str, overrides: list[str] = []) -> Any:  # noqa: B006
    """Return the run.Partial of `experiment` for a run, to change and to pass on."""
    return run.Partial(experiment, config=config, overrides=overrides)


@run.cli.factory
def slurm() -> run.Config[run.SlurmExecutor]:
    """Return the executor of the run's section slurm, for `experiment`; what is set of its fields wins."""
    return nemo.SetByHand(account=None).to_config()


@run.cli.factory
def local() -> run.Config[run.LocalExecutor]:
    """Return the executor of this machine."""
    return run.Config(run.LocalExecutor)
