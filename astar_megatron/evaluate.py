"""Greedy pass@1 with the pool, the prompts' template and the reward of training.

Leaves out: several samples a prompt, named benchmarks.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from astar_megatron.config import RunConfig
from astar_megatron.data.contract import tokenizer_digest
from astar_megatron.data.files import write_atomic
from astar_megatron.rollout.pool import EnginePool, seed_of
from astar_megatron.rollout.scoring import Scorer
from astar_megatron.run import Inputs, engines_of, prepare
from astar_megatron.tracking import Tracker
from conversion import hf
from conversion.families import read_model


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Mean reward of greedy responses, the standard error of it, and the share cut by the token limit."""

    reward_mean: float
    reward_error: float
    truncated: float
    prompts: int


def main(cfg: RunConfig, model_path: str | None = None) -> None:
    """Evaluate the folder `model_path`; none: the run's export, which training wrote."""
    path = Path(model_path) if model_path else cfg.export_dir
    if not path.is_dir():
        raise ValueError(f"{path}: no model to evaluate; run `astar train` first, or name a folder with --model")
    hf.check(path, read_model(path).parameters())
    if tokenizer_digest(path) != tokenizer_digest(Path(cfg.model.path)):
        raise ValueError(f"{path}: its tokenizer is not that of model.path, {cfg.model.path}; set model.path to it")
    inputs = prepare(cfg)
    tracker = Tracker(cfg.run_dir)
    with engines_of(cfg, str(path)) as engines:
        show(str(path), evaluate(cfg, inputs, engines, tracker, "eval"), tracker)


def evaluate(cfg: RunConfig, inputs: Inputs, engines: EnginePool, tracker: Tracker, name: str) -> Evaluation:
    """Evaluate what the engines hold; every response goes to `<run_dir>/<name>.jsonl`."""
    work = [(prompt, 0, seed_of(cfg.seed, "eval", prompt.uid)) for prompt in inputs.eval_prompts]
    progress = tracker.progress(f"evaluation, {name}", len(work))
    with progress as advance, Scorer(cfg.reward, tracker.run_dir) as scorer:
        rollouts = scorer.score(engines.draw(work, cfg.sampling, greedy=True, advance=advance))
    rows = [
        {
            "uid": rollout.prompt.uid,
            "prompt": rollout.prompt.text,
            "answer": rollout.prompt.answer,
            "response": rollout.text,
            "reward": rollout.reward,
            "truncated": rollout.truncated,
        }
        for rollout in rollouts
    ]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomic(tracker.run_dir / f"{name}.jsonl", lines.encode())
    rewards = [rollout.reward or 0.0 for rollout in rollouts]
    mean = sum(rewards) / len(rewards)
    variance = sum((reward - mean) ** 2 for reward in rewards) / max(1, len(rewards) - 1)
    return Evaluation(
        reward_mean=mean,
        reward_error=(variance / len(rewards)) ** 0.5,
        truncated=sum(rollout.truncated for rollout in rollouts) / len(rollouts),
        prompts=len(rollouts),
    )


def show(title: str, found: Evaluation, tracker: Tracker) -> None:
    """Show one evaluation."""
    tracker.table(
        f"greedy evaluation of {title}",
        [
            ("prompts", str(found.prompts)),
            ("mean reward", f"{found.reward_mean:.3f} ± {found.reward_error:.3f}"),
            ("truncated", f"{found.truncated:.1%}"),
        ],
    )
