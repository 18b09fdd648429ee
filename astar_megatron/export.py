"""Writes the newest checkpoint of a run as a Hugging Face folder; needs the policy's ranks, no engines."""

from contextlib import closing
from pathlib import Path

from astar_megatron.checkpoints import Checkpoints
from astar_megatron.cluster.cluster import Cluster
from astar_megatron.config import RunConfig
from astar_megatron.data.prompts import PromptStream
from astar_megatron.run import prepare, start_policy
from astar_megatron.tracking import Tracker
from astar_megatron.weights import TransferFolder
from conversion import hf


def main(cfg: RunConfig, destination: Path) -> None:
    """Export to `destination`. Raises ValueError where the run has no checkpoint."""
    hf.check_destination(destination)
    inputs = prepare(cfg)
    checkpoints = Checkpoints(Path(cfg.run_dir), cfg.checkpoint, inputs.contract)
    if checkpoints.latest is None:
        raise ValueError(f"{cfg.run_dir}: no checkpoint to convert; run `astar train` first")
    tracker = Tracker(cfg.run_dir)
    with Cluster(cfg.cluster) as cluster, closing(start_policy(cfg, cluster)) as policy, TransferFolder() as folder:
        policy.start()
        step = checkpoints.resume(policy, PromptStream(inputs.prompts, cfg.train.batch_size, cfg.seed))
        policy.export(destination, folder.path)
    tracker.say(f"step {step} exported to {destination}")
