"""What training begins with: what stage 1 says, the objective, the order of prompts, and where the run goes on from."""

from contextlib import suppress
from pathlib import Path

from astar_megatron import config
from astar_megatron.algorithm import methods
from astar_megatron.algorithm.objective import Objective
from astar_megatron.config import RunConfig
from astar_megatron.data import filters, rollout_files
from astar_megatron.data.allocation import run_estimates, stage_1_of
from astar_megatron.data.estimates import Estimates
from astar_megatron.data.header import MissingTableError, check_header
from astar_megatron.data.prioritised import PrioritisedPrompts
from astar_megatron.data.prompts import PromptStream
from astar_megatron.data.run_folder import BAD_BATCHES
from astar_megatron.model.compute_type import compute_type
from astar_megatron.run import dashboard_libraries, dashboards, profiles, resources
from astar_megatron.run.checkpoints import Checkpoints
from astar_megatron.run.prepare import Inputs
from astar_megatron.run.tracking import METRICS_FILE, PLACEMENT_FILE, read_metrics
from conversion import folders


def stage_1(cfg: RunConfig, inputs: Inputs) -> Estimates | None:
    """Return what stage 1 says of the run's prompts, if its method or filter asks.

    Raises MissingTableError, ContractError.
    """
    return run_estimates(cfg, inputs.contract, inputs.prompts) if cfg.asks_stage_1 else None


def objective_of(cfg: RunConfig, estimates: Estimates | None) -> Objective:
    """Return the method, as it begins with what stage 1 found."""
    return methods.objective_of(cfg, stage_1_of(estimates))


def prompt_stream(
    cfg: RunConfig, inputs: Inputs, estimates: Estimates | None, objective: Objective
) -> PromptStream | PrioritisedPrompts:
    """Return the order in which training takes prompts, left out or rarer where stage 1 says they teach little."""
    weights = filters.weights(estimates, cfg.filter) if estimates else None
    number = cfg.train.batch_size // cfg.group_size
    if objective.chooses_prompts:
        return PrioritisedPrompts(inputs.prompts, number, cfg.seed, objective.priorities, weights)
    return PromptStream(inputs.prompts, number, cfg.seed, weights)


def checkpoints_of(cfg: RunConfig, inputs: Inputs) -> Checkpoints:
    """Return the run's checkpoints."""
    return Checkpoints(Path(cfg.run_dir), cfg.checkpoint, inputs.contract, config.flat(cfg))


def check_before_stage_1(cfg: RunConfig, inputs: Inputs) -> None:
    """Raise ValueError for what of a training can be wrong before there is a table: it would cost a sweep."""
    if cfg.asks_stage_1:  # of a table that is there the header
        with suppress(MissingTableError):
            check_header(cfg.table_dir, inputs.contract)
    dashboard_libraries.check(cfg.tracking)
    checkpoints = checkpoints_of(cfg, inputs)
    checkpoints.verify()  # reads the newest whole
    checkpoints.check_method()
    if cfg.cluster.address is None:  # else it is known when the cluster has been joined
        checkpoints.check_type(compute_type(cfg.model.dtype, resources.measure().num_accelerators)[0])
    _check_metrics(cfg, checkpoints.steps)
    check_prompts(cfg, inputs)
    _check_kinds(Path(cfg.run_dir))
    folders.check_destination(cfg.export_dir)
    resources.check_disk(cfg, inputs.model.num_parameters())


def check_prompts(cfg: RunConfig, inputs: Inputs) -> None:
    """Raise ValueError where the prompts are too few, or not those that the run's checkpoint was trained on.

    With a filter, which prompts there are is known after stage 1.
    """
    if not cfg.filter.leaves_out:
        checkpoints_of(cfg, inputs).check_prompts(prompt_stream(cfg, inputs, None, objective_of(cfg, None)))


def check_training(cfg: RunConfig, inputs: Inputs, estimates: Estimates | None) -> None:
    """Raise ValueError where training can't go on from the newest checkpoint; after `check_before_stage_1`."""
    checkpoints, objective = checkpoints_of(cfg, inputs), objective_of(cfg, estimates)
    done = checkpoints.restore(prompt_stream(cfg, inputs, estimates, objective), objective)
    checkpoints.in_flight(inputs.prompts)
    if done > cfg.train.num_steps:
        raise ValueError(
            f"train.num_steps: {cfg.train.num_steps}, but the newest checkpoint of {cfg.run_dir} was written after "
            f"{done} steps; raise it, choose a new run_dir, or write the name of an earlier step_* folder into "
            f"{cfg.run_dir}/checkpoints/latest"
        )


def _check_kinds(run_dir: Path) -> None:
    """Raise ValueError where a file lies in the place of a folder of the run's, or a folder in that of a file.

    Checkpoints and metrics have been read by then.
    """
    for name in (rollout_files.FOLDER, BAD_BATCHES, dashboards.FOLDER, profiles.FOLDER):
        if (run_dir / name).exists() and not (run_dir / name).is_dir():
            raise ValueError(f"run_dir: {run_dir / name} is no folder; move it away, or choose another run_dir")
    if (run_dir / PLACEMENT_FILE).is_dir():
        raise ValueError(f"run_dir: {run_dir / PLACEMENT_FILE} is a folder; move it away, or choose another run_dir")


def _check_metrics(cfg: RunConfig, done: int) -> None:
    """Raise ValueError where to go on after `done` steps would lose some of a run."""
    path = Path(cfg.run_dir) / METRICS_FILE
    steps = [line["step"] for line in read_metrics(cfg.run_dir)]
    if (before := sum(step < done for step in steps)) < done:
        raise ValueError(
            f"{path}: it has {before} of the {done} steps that are behind the newest checkpoint, and what they cost is "
            "part of the run; put the file there as it was, or choose a new run_dir"
        )
    if steps and not done and (cfg.export_dir / folders.RECORD).exists():
        raise ValueError(
            f"{path}: this run has ended after {len(steps)} steps, and there is no checkpoint to go on from; to start "
            "over would remove what it found: choose a new run_dir, or move what is in this one away"
        )
