"""PROGRAM: `astar doctor --config` says whether a run can start, or go on, on this machine; nothing is started."""

from astar_megatron.config import RunConfig
from astar_megatron.data.header import MissingTableError
from astar_megatron.model import layouts
from astar_megatron.run import resources
from astar_megatron.run.prepare import check_ranks, prepare
from astar_megatron.run.training import check_before_stage_1, check_training, stage_1


def main(cfg: RunConfig) -> None:
    """Say what a run needs of this machine. Raises ValueError, as training would, where it can't start or go on."""
    inputs = prepare(cfg)
    shares = check_ranks(cfg)
    check_before_stage_1(cfg, inputs)
    try:
        done = "stage 1 is done" if stage_1(cfg, inputs) else f"{cfg.objective.name} needs no stage 1"
    except MissingTableError:
        done = "stage 1 is still to be done"
    else:
        check_training(cfg, inputs)
    need = resources.needs(cfg, 4 * inputs.model.num_parameters(), resources.measure())
    print(
        f"this run can start here: {len(inputs.prompts)} prompts, {inputs.model.num_parameters():,} parameters; "
        f"{done}; policy on {layouts.described(cfg.parallel)}; it needs at least "
        f"{need.memory_bytes / resources.GIB:.1f} GiB of memory and {need.shared_bytes / resources.GIB:.1f} "
        "GiB of /dev/shm, activations on top"
    )
    if shares:
        print(shares.describe())
