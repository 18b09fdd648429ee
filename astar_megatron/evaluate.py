"""PROGRAM: the run's evaluation prompts, or named benchmarks, with the pool, sampling and reward rules of training.

Of every problem one greedy response, whose mean reward is the greedy score, and where the benchmark or
`eval.num_samples` asks for n samples also avg@n, maj@n and pass@k (algorithm/estimators.py), each with its standard
error over the problems. A response cut by the token limit is scored as it stands.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from astar_megatron.config import RunConfig
from astar_megatron.data.contract import tokenizer_digest
from astar_megatron.data.run_folder import STEPS
from astar_megatron.exports import card
from astar_megatron.exports.provenance import Training
from astar_megatron.exports.weights import weights_of
from astar_megatron.run import scores
from astar_megatron.run.checkpoints import CHECKPOINTS_FOLDER
from astar_megatron.run.evaluation import evaluate, show
from astar_megatron.run.fleet import engines_of
from astar_megatron.run.prepare import prepare, with_room
from astar_megatron.run.tracking import Tracker
from conversion import rewrite
from conversion.ends import End, MegatronEnd, open_end
from conversion.folders import read_record
from conversion.weight_files import check_engines_read


def main(cfg: RunConfig, model_path: str | None = None) -> None:
    """Evaluate `model_path`, a Hugging Face folder or a checkpoint of the run; none: the run's export."""
    path = Path(model_path) if model_path else cfg.export_dir
    if not path.is_dir():
        raise ValueError(f"{path}: no model to evaluate; run `astar train` first, or name a folder with --model")
    _check_no_run(path, cfg.export_dir.name)
    if tokenizer_digest(path) != tokenizer_digest(Path(cfg.model.path)):
        raise ValueError(f"{path}: its tokenizer is not that of model.path, {cfg.model.path}; set model.path to it")
    check_engines_read(path)  # first: what it refuses is not left out
    end = open_end(path)
    cfg = with_room(cfg)
    inputs = prepare(cfg, for_training=False)
    tracker = Tracker(cfg.run_dir)
    with hugging_face(end, tracker) as folder:
        with tracker.waiting(f"reading the weights of {path}"):
            weights, reason = weights_of(folder)
        if reason and read_record(folder):
            tracker.say(f"{path}: {reason}: its scores are kept as those of another model")
        name = scores.name_of(weights)
        scores.kept(tracker.run_dir, weights)  # damaged ones are refused before engines start
        with engines_of(cfg, tracker, str(folder)) as engines:
            for evaluation, responses in evaluate(cfg, inputs, engines, tracker, name):
                show(str(path), [evaluation], tracker)
                scores.keep(tracker.run_dir, weights, evaluation, responses)
    tracker.say(f"scores and responses of these weights are in {tracker.run_dir / name}*")
    export = cfg.export_dir
    if export.is_dir() and scores.weights_digest(read_record(export)) == weights == weights_of(export)[0]:
        tracker.say(card.write(export, Training.of_folder(export), Path(cfg.run_dir)))


def _check_no_run(path: Path, export_name: str) -> None:
    """Raise ValueError for a run's folder, or that of its checkpoints: models lie in them."""
    names = (export_name, STEPS, f"{CHECKPOINTS_FOLDER}/{STEPS}")
    models = sorted(folder for name in names for folder in path.glob(name) if folder.is_dir())
    if models and not (path / "config.json").exists():
        newest = " or ".join(map(str, models[-2:]))  # the export is the last
        raise ValueError(f"{path}: that is a folder of a run, and no model; name one in it with --model, as {newest}")


@contextmanager
def hugging_face(end: End, tracker: Tracker) -> Iterator[Path]:
    """The Hugging Face folder of `end`; of a checkpoint of Megatron a copy in that format, for as long."""
    if end.kind != MegatronEnd.kind:
        yield end.path
        return
    with tempfile.TemporaryDirectory(dir=tracker.run_dir, prefix="eval_") as temporary:
        folder = Path(temporary) / "hf"
        with tracker.progress(f"{end.path} as a Hugging Face folder", len(end.model.parameters())) as advance:
            rewrite.write_hf(end, folder, advance)
        yield folder
