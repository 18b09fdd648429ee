"""`nemorun astar experiment config=FILE`: the stages of a run, the way of nemo-run.

nemo-run loads this file by the entry point `nemo_run.cli`. Without `run.executor` the jobs are those of the file's
section slurm; `run.executor=slurm` is an executor whose fields its command line sets, as run.executor.nodes=4.
"""

from typing import Any

import nemo_run as run  # pyright: ignore[reportMissingImports]

from astar_megatron.config import SlurmConfig, load
from astar_megatron.launch import checks, nemo
from astar_megatron.launch.stages import title


@run.cli.entrypoint(namespace="astar", type="experiment")
def experiment(
    ctx: run.cli.RunContext,
    config: str,
    overrides: list[str] = [],  # noqa: B006 (nemo-run's command line has no word for other types; nobody changes it)
    python: str = "python",
) -> None:
    """The stages of a run, one after the other; `overrides` are words such as optim.lr=1e-6."""
    checks.of_environment()
    cfg = load(config, overrides)
    executor = ctx.executor or nemo.slurm_executor(cfg.slurm, title(cfg))
    if isinstance(executor, run.SlurmExecutor):
        checks.of_nemo_run(cfg, config)
    nemo.export_all()
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
    """Return an executor whose batch script is slurm/train.sbatch; all else is nemo-run's to set."""
    return nemo.slurm_executor(SlurmConfig(), "astar").to_config()


@run.cli.factory
def local() -> run.Config[run.LocalExecutor]:
    """Return the executor of this machine."""
    return run.Config(run.LocalExecutor)
