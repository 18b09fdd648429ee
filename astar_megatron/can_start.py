"""PROGRAM: whether a run can start, or go on, and where its processes would be; nothing is started.

`astar doctor --config` asks it, and `astar train --dry-run`.
"""

import json
from pathlib import Path
from typing import Any

from astar_megatron.cluster.cluster import Cluster
from astar_megatron.config import RunConfig
from astar_megatron.config_secrets import without_logins
from astar_megatron.data import chat
from astar_megatron.data.files import StorageError, refusal_at
from astar_megatron.data.header import MissingTableError
from astar_megatron.run import resources
from astar_megatron.run.prepare import Inputs, check_here, placement_of, prepare
from astar_megatron.run.tracking import Screen
from astar_megatron.run.training import check_before_stage_1, check_training, checkpoints_of, stage_1
from astar_megatron.types import Prompt

_SHOWN = 600  # characters of a prompt, at either end


def main(cfg: RunConfig) -> None:
    """Say what a run needs and where it goes. Raises ValueError, as training would, where it can't start or go on.

    A cluster that the run joins is joined to ask for its nodes, and left.
    """
    inputs = prepare(cfg)
    here = check_here(cfg)
    check_before_stage_1(cfg, inputs)
    _check_writable("run_dir", cfg.run_dir)
    try:
        estimates = stage_1(cfg, inputs)
    except MissingTableError:
        _check_writable("sweep.table", cfg.table_dir)
        done = "stage 1 is still to be done"
    else:
        check_training(cfg, inputs, estimates)
        done = "stage 1 is done" if estimates else f"{cfg.objective.name} needs no stage 1"
    screen = Screen()
    if here:
        placement, shares = here
    else:
        with Cluster(cfg.cluster) as cluster:
            placement, shares = placement_of(cfg, cluster.nodes.values()), None
    words = f"this run can {_begins(cfg, inputs)}: {len(inputs.prompts)} prompts, "
    words += f"{inputs.model.num_parameters():,} parameters; {done}; policy on {cfg.parallel.describe()}"
    if here:
        need = resources.needs(cfg, inputs.model, resources.measure())
        words += (
            f"; it needs at least {resources.gib(need.memory_bytes)} of memory and {resources.gib(need.shared_bytes)} "
            "of /dev/shm, activations on top"
        )
    screen.say(words)
    screen.say(_as_read(inputs.prompts[0], cfg.model.path))
    if words := chat.read_otherwise(cfg.model.path, [prompt.text for prompt in inputs.prompts], cfg.data.date):
        screen.say(words)
    screen.table(placement.describe(), placement.rows())
    if shares:
        screen.say(shares.describe())


def _check_writable(key: str, folder: str | Path) -> None:
    if problem := refusal_at(folder):
        raise StorageError(f"{key}: {folder}: {problem}; choose another place")


def _begins(cfg: RunConfig, inputs: Inputs) -> str:
    """Whether the run starts or goes on, from where, and what of its settings is not as it was."""
    checkpoints = checkpoints_of(cfg, inputs)
    if not (step := checkpoints.steps):
        return "start"
    left = cfg.train.num_steps - step
    words = f"go on after step {step}, {left} to go" if left else f"only export again, all {step} steps are behind it"
    changed = checkpoints.changed_settings()
    return words + (f", with other settings than before ({'; '.join(changed)})" if changed else "")


def _as_read(prompt: Prompt, model_path: str) -> str:
    """A prompt as the model reads it, special tokens and line ends written out; the middle of a long one left out."""
    tokenizer: Any = chat.tokenizer(model_path)
    text: str = tokenizer.decode(list(prompt.token_ids), skip_special_tokens=False)
    if len(text) > 2 * _SHOWN:
        text = f"{text[:_SHOWN]} ... {text[-_SHOWN:]}"
    words = f"the first prompt, {len(prompt.token_ids)} tokens"
    if without_logins(text) != text:
        words += ", with what looks like a login, which the model reads and the screen does not show"
    return f"{words}: {json.dumps(text, ensure_ascii=False)}"
