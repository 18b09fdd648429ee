"""The stages of a run as jobs: what each runs, on how many nodes, and after which. Pure: nothing is started or asked.

Sweep and evaluation get the fewest nodes that hold the engines, training `slurm.nodes`, which it must use, export one
without GPUs; each gets ASTAR_SPARE_NODES more, of `slurm.env`.
"""

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from astar_megatron.cluster.demands import idle_nodes, key_for_gpus, num_used
from astar_megatron.cluster.placement import Node, Placement, place
from astar_megatron.config import STAGES, ConfigError, RunConfig, Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A stage as a job; `words` follow the configuration's file on the command line of `astar`."""

    stage: Stage
    name: str  # the run's and the stage's
    nodes: int
    gpus_per_node: int
    config_file: str
    words: tuple[str, ...]

    @property
    def command(self) -> tuple[str, ...]:
        """What `astar` is called with."""
        return (self.stage, "--config", self.config_file, *self.words)


def jobs_of(cfg: RunConfig, config_file: str, overrides: Sequence[str] = ()) -> list[Job]:
    """Return the jobs of a run in their order, each of which begins when the one before it has succeeded.

    What a job reads in place of the file and `overrides` is a copy (copies.py). Raises ConfigError or PlacementError
    where the run does not fit the nodes, or leaves some without work.
    """
    stages = sorted(set(cfg.slurm.stages or _usual(cfg)), key=STAGES.index)
    words = tuple(word for text in overrides for word in ("--set", text))
    placements = {stage: _placement(cfg, stage) for stage in stages if stage != "export"}
    if "train" in stages and (problem := idle_nodes(cfg, placements["train"])):
        raise ConfigError(problem)
    return [
        Job(
            stage=stage,
            name=f"{title(cfg)}-{stage}",
            nodes=(num_used(placements[stage]) if stage in placements else 1) + cfg.slurm.spare_nodes,
            gpus_per_node=cfg.slurm.gpus_per_node if stage in placements else 0,
            config_file=config_file,
            words=words,
        )
        for stage in stages
    ]


def title(cfg: RunConfig) -> str:
    """Return the name that the run's jobs begin with: its folder's, and a digest of where that folder lies.

    By it jobs are asked for and cancelled, which must not be those of another run whose folder has the same name.
    """
    place = f"{cfg.slurm.ssh}/{cfg.run_dir}" if cfg.slurm.ssh else os.path.realpath(cfg.run_dir)
    name = re.sub(r"[^\w.-]", "_", Path(place).name) or "run"
    return f"{name}-{hashlib.sha256(place.encode()).hexdigest()[:8]}"


def names(cfg: RunConfig) -> list[str]:
    """Return the names of the run's jobs, of all stages."""
    return [f"{title(cfg)}-{stage}" for stage in STAGES]


def _usual(cfg: RunConfig) -> list[Stage]:
    return ["sweep", "train", "eval"] if cfg.asks_stage_1 else ["train", "eval"]


def _placement(cfg: RunConfig, stage: Stage) -> Placement:
    size = cfg.slurm.gpus_per_node
    if not size and (key := key_for_gpus(cfg)):
        raise ConfigError(f"slurm.gpus_per_node: 0, but {key} is for GPUs; take 1 or more, or leave that key out")
    nodes = [Node(address=f"node {number}", num_gpus=size) for number in range(1, cfg.slurm.nodes + 1)]
    return place(nodes, cfg.parallel if stage == "train" else None, cfg.rollout, cfg.cluster.share_gpus)
