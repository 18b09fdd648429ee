"""Whether a run suits the nodes that it was given: GPUs where it wants some, and no node without work. Pure."""

from collections.abc import Sequence

from astar_megatron.cluster.placement import Node, Placement, PlacementError, counted, place
from astar_megatron.config import RunConfig

_WITH_POLICY = ("train", "compare")
_WITHOUT_PROCESSES = ("export",)


def key_for_gpus(cfg: RunConfig) -> str | None:
    """Return a key of the run that only GPUs can follow, with its value."""
    keys = {
        f"cluster.share_gpus={str(cfg.cluster.share_gpus).lower()}": cfg.cluster.share_gpus is not None,
        f"model.fp8={cfg.model.fp8}": cfg.model.fp8,
        "model.reference=offload": cfg.model.reference == "offload",
        "optim.offload=true": cfg.optim.offload,
        "rollout.graphs=decode": cfg.rollout.graphs == "decode",
    }
    return next((key for key, is_set in keys.items() if is_set), None)


def num_used(placement: Placement) -> int:
    """Return how many nodes have a rank or an engine."""
    return len({seat.node for seat in (*placement.ranks, *placement.engines)})


def idle_nodes(cfg: RunConfig, placement: Placement) -> str:
    """Return in words that some of `slurm.nodes` would have nothing to do in training; "" where each has."""
    used = num_used(placement)
    if used == cfg.slurm.nodes:
        return ""
    return (
        f"slurm.nodes: {cfg.slurm.nodes}, of which {cfg.slurm.nodes - used} would have nothing to do: "
        f"{placement.describe()}; take {used}, or raise rollout.num_engines or parallel.data"
    )


def check_job(cfg: RunConfig, program: str, nodes: Sequence[Node], num_spare: int) -> None:
    """Raise PlacementError where a command of astar, as `train`, does not fit a job's nodes, or leaves some idle.

    `num_spare` of the nodes may be idle.
    """
    if program in _WITHOUT_PROCESSES:
        return
    if (key := key_for_gpus(cfg)) and not any(node.num_gpus for node in nodes):
        raise PlacementError(
            f"{key} is for GPUs, but the job has none; ask for them, as sbatch --gpus-per-node=4, or leave that key out"
        )
    placement = place(nodes, cfg.parallel if program in _WITH_POLICY else None, cfg.rollout, cfg.cluster.share_gpus)
    used = num_used(placement)
    if used < len(nodes) - num_spare:
        raise PlacementError(
            f"{counted(len(nodes), 'node')} of the job, of which {len(nodes) - used} would have nothing to do: "
            f"{placement.describe()}; ask for {used} (sbatch -N), or raise rollout.num_engines or parallel.data"
        )
