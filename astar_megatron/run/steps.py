"""One step of training, beside what computes it: its batch, its line of metrics, and what a bad one leaves."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from astar_megatron.algorithm.metrics import LogprobSums
from astar_megatron.algorithm.objective import Objective
from astar_megatron.config import RunConfig
from astar_megatron.data import bad_batches
from astar_megatron.data.run_folder import BAD_BATCHES
from astar_megatron.types import Rollout, RolloutBatch, StepOptions, StepStats


class NotFiniteError(ValueError):
    """Too many optimiser steps were left out; the message names where their batches lie."""


def step_options(cfg: RunConfig) -> StepOptions:
    """Return how each step is computed."""
    return StepOptions(
        temperature=cfg.sampling.temperature,
        mini_batch_size=cfg.mini_batch_size,
        micro_batch_tokens=cfg.train.micro_batch_tokens,
    )


def batch_of(rollouts: Sequence[Rollout], objective: Objective, version: int) -> RolloutBatch:
    """The rollouts as the policy needs them, to train weights of `version` on them."""
    columns = objective.columns(rollouts)
    return RolloutBatch(
        token_ids=tuple(rollout.prompt.token_ids + rollout.token_ids for rollout in rollouts),
        prompt_tokens=tuple(len(rollout.prompt.token_ids) for rollout in rollouts),
        columns=columns.sequences,
        token_columns=columns.tokens,
        version=version,
    )


def health_of(
    objective: Objective, rollouts: Sequence[Rollout], batch: RolloutBatch, stats: StepStats, on_policy: int
) -> dict[str, float]:
    """What the objective makes of the step that trained on `batch`, and how far the engines were.

    The first `on_policy` rollouts were scored by the weights of its version.
    """
    sums = LogprobSums(
        logprobs=torch.tensor(stats.logprobs, dtype=torch.float64),
        reference=torch.tensor(stats.reference_logprobs, dtype=torch.float64),
        on_policy=on_policy,
    )
    gaps = [
        logprob - rollout.logprob
        for logprob, rollout in zip(stats.logprobs[:on_policy], rollouts, strict=False)
        if rollout.first_version == batch.version
    ]
    gap = torch.tensor(gaps or [math.nan], dtype=torch.float64)
    gaps_of_step = {"engine_gap": float(gap.mean()), "engine_gap_max": float(gap.abs().max())}
    return {**objective.metrics(rollouts, batch.columns, sums), **gaps_of_step}


def metrics_of(
    step: int,
    rollouts: Sequence[Rollout],
    health: Mapping[str, float],
    stats: StepStats,
    spent_tokens: int,
    seconds: dict[str, float],
) -> dict[str, object]:
    """Return a line of metrics; astar_megatron/README.md explains the keys."""
    count = len(rollouts)
    return {
        "step": step,
        "version": step,
        "reward_mean": sum(rollout.score for rollout in rollouts) / count,
        "loss": stats.loss,
        "grad_norm": stats.grad_norm,
        "lr": stats.learning_rate,
        "changed_weights": stats.changed_weights,
        "skipped_steps": len(stats.skipped),
        **health,
        **stats.critic,
        **staleness(step, rollouts),
        "truncated": sum(rollout.truncated for rollout in rollouts) / count,
        "tokens": stats.tokens,
        "response_tokens": stats.response_tokens,
        "tokens_per_second": stats.tokens_per_second,
        "model_flops": stats.model_flops,
        "mfu": stats.mfu,
        "peak_memory_bytes": list(stats.peak_memory_bytes),
        "spent_tokens": spent_tokens,
        "seconds": {**stats.seconds, **seconds, "ranks_idle": seconds["total"] - sum(stats.seconds.values())},
    }


def staleness(version: int, rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Return how much older than `version`, which is trained on them, the weights were that drew the rollouts."""
    ages = [version - rollout.first_version for rollout in rollouts]
    older = sum(rollout.older_tokens(version) for rollout in rollouts)
    tokens = sum(len(rollout.token_ids) for rollout in rollouts)
    return {
        "staleness_mean": sum(ages) / len(ages),
        "staleness_max": max(ages),
        "older_tokens": older / tokens if tokens else 0.0,
    }


def line_of(metrics: dict[str, object], num_steps: int) -> str:
    """Return what the screen says of a step."""
    seconds: dict[str, float] = metrics["seconds"]  # type: ignore[assignment]
    names = ("generate", "reference", "policy", "turns", "publish")  # turns: where GPUs are shared
    spans = " ".join(f"{name} {seconds[name]:.1f}" for name in names if name in seconds)
    return (
        f"step {metrics['step']:>3} of 0..{num_steps - 1}  reward {metrics['reward_mean']:.3f}  "
        f"loss {metrics['loss']:.4f}  log-ratio {metrics['logratio_mean']:+.2f}  {seconds['total']:.1f} s ({spans})"
    )


def keep_bad_batch(
    run_dir: Path, rollouts: Sequence[Rollout], batch: RolloutBatch, stats: StepStats, settings: Mapping[str, Any]
) -> str:
    """Write a batch that spoiled a step to disk and return in words what happened."""
    folder = bad_batches.write(run_dir, rollouts, batch, stats, settings)
    return (
        f"step {batch.version}: a loss or a gradient was not finite in mini-batches {list(stats.skipped)}; their "
        f"optimiser steps were left out, weights and optimiser are as before; the batch is in {folder}"
    )


def skipped_of(line: Mapping[str, Any]) -> int:
    """Return how many optimiser steps a line of metrics says were left out, a critic's too."""
    return line.get("skipped_steps", 0) + int(line.get("critic_skipped_steps", 0))


def check_skipped(skipped: int, limit: int, run_dir: Path) -> None:
    """Raise NotFiniteError where `skipped` optimiser steps of the run, `limit` or more, were left out."""
    if skipped >= limit:
        raise NotFiniteError(
            f"train.max_skipped_steps: a loss or a gradient was not finite {skipped} times, {limit} end the run; look "
            f"into {run_dir / BAD_BATCHES}, lower optim.lr or raise the key, and run the same command again"
        )
