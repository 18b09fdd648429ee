"""PROGRAM: the newest checkpoint of a run as a Hugging Face folder, and the way of that folder to the hub."""

from pathlib import Path

from astar_megatron.config import RunConfig
from astar_megatron.exports import card, conversions, hub
from astar_megatron.exports.provenance import Training
from astar_megatron.run import certificate, checkpoints
from astar_megatron.run.tracking import Screen
from conversion.folders import read_record


def main(cfg: RunConfig, repo: str | None, *, private: bool) -> None:
    """Export to `<run_dir>/hf`, and send it to `repo` of the hub, ORG/NAME, if one is named.

    What is to be sent is written anew only where it is not of the newest checkpoint, as training's own export is.
    """
    to = hub.destination(repo, private=private) if repo is not None else None  # first: an export takes long
    run_dir = Path(cfg.run_dir)
    if to is None or not _is_of(cfg.export_dir, checkpoints.latest(run_dir)):
        conversions.to_hf(str(checkpoints.newest(run_dir)), str(cfg.export_dir), like=None, dry_run=False)
    if to is not None:
        screen = Screen()
        with screen.waiting(f"reading the weights of {cfg.export_dir}"):
            hub.check(cfg.export_dir)
        screen.say(card.write(cfg.export_dir, Training.of_folder(cfg.export_dir), run_dir))
        with screen.waiting(f"sending {cfg.export_dir}"):
            address = hub.push(cfg.export_dir, to)
        screen.say(f"sent to {address}")


def _is_of(folder: Path, checkpoint: Path | None) -> bool:
    """Whether a folder is a sound export of the checkpoint; of any, where the run has removed its checkpoints."""
    record = read_record(folder) if folder.is_dir() else None
    if record is None or certificate.doubt(record):
        return False
    if checkpoint is None:
        return True
    of_folder, of_checkpoint = Training.of_folder(folder), Training.of_folder(checkpoint)
    return of_folder is not None and of_checkpoint is not None and of_folder.step == of_checkpoint.step
