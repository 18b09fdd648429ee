"""`nemorun astar experiment config=FILE executor=slurm executor.nodes=4`: the stages of a run, the way of nemo-run.

nemo-run finds this file by the entry point `nemo_run.cli`. Executors are factories, so that every field of theirs can
be set on its command line; in Python they are what nemo.py returns.
"""

from typing import Any

import nemo_run as run  # pyright: ignore[reportMissingImports]

from astar_megatron.config import load
from astar_megatron.launch import nemo
from astar_megatron.launch.stages import title


@run.cli.entrypoint(namespace="astar", type="experiment")
def experiment(
    ctx: run.cli.RunContext, config: str, overrides: list[str] | None = None, python: str = "python"
) -> None:
    """Sweep, training and evaluation of a run as one experiment; `overrides` are words such as slurm.stages=[train]."""
    cfg = load(config, overrides or ())
    with run.Experiment(title(cfg)) as own:
        nemo.add_stages(own, config, ctx.executor or run.LocalExecutor(), overrides or (), python)
        ctx.launch(own)


@run.cli.factory(target=experiment)
def recipe(config: str, overrides: list[str] | None = None) -> Any:
    """Return the run.Partial of `experiment` for a run, to change and to pass on."""
    return run.Partial(experiment, config=config, overrides=overrides or [])


@run.cli.factory
def slurm(config: str, overrides: list[str] | None = None) -> run.Config[run.SlurmExecutor]:
    """Return the executor of a run's `slurm` section."""
    cfg = load(config, overrides or ())
    return nemo.slurm_executor(cfg.slurm, title(cfg)).to_config()


@run.cli.factory
def local() -> run.Config[run.LocalExecutor]:
    """Return the executor of this machine."""
    return run.Config(run.LocalExecutor)
