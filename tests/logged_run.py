"""A run whose lines of metrics are shown on dashboards, of steps that nobody computed."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import samples
import torch

from astar_megatron import config
from astar_megatron.config import RunConfig
from astar_megatron.run.dashboards import Dashboards, dashboards_of
from astar_megatron.types import Prompt, Rollout, RolloutBatch

SECRET = "not-to-be-written-" + "7f3a"
PROMPT = Prompt(uid="u", token_ids=(1, 3), text="What is 1 + 1?", answer="2")


def line(step: int, *, reward: float = 0.5, evaluated: bool = False) -> dict[str, Any]:
    metrics: dict[str, Any] = {
        "step": step,
        "reward_mean": reward,
        "mfu": None,
        "response_tokens": 100,
        "spent_tokens": 1000 + 100 * (step + 1),
        "peak_memory_bytes": [5, 6],
        "seconds": {"total": 2.0, "policy": 1.0},
    }
    scores = {"greedy": 0.25, "formatted": None, "avg@4": 0.125, "maj@4": 0.25, "pass@2": 0.5}
    return metrics | ({"eval": {"gsm8k": scores}} if evaluated else {})


def rollouts_of(step: int) -> list[Rollout]:
    return [samples.rollout(PROMPT, text=f"{step}|{n}\nthe end", reward=n / 4, sample=n) for n in range(4)]


def log(dashboards: Dashboards, metrics: Mapping[str, Any]) -> None:
    rollouts = rollouts_of(metrics["step"])
    batch = RolloutBatch(
        token_ids=tuple(PROMPT.token_ids + rollout.token_ids for rollout in rollouts),
        prompt_tokens=(2,) * 4,
        columns={"v_star": torch.tensor([0.1, 0.2, 0.2, float("nan")], dtype=torch.float64)},
        version=metrics["step"],
    )
    stats = replace(samples.STATS, logprobs=(-1.0,) * 4, reference_logprobs=(-2.0, -1.0, -1.0, -1.0))
    dashboards.log(metrics, rollouts, batch, stats)


def run_of(folder: Path, **tracking: Any) -> RunConfig:
    return config.validate(
        {
            "run_dir": str(folder / "run"),
            "model": {"path": f"models/{SECRET}"},
            "data": {"path": "some.jsonl"},
            "reward": {"name": "last_number"},
            "tracking": tracking,
        }
    )


class Words(list[str]):
    """What the screen was told."""

    def say(self, text: str) -> None:
        self.append(text)


def two_starts(cfg: RunConfig, words: Words) -> None:
    """Steps 0 to 2 and the last evaluation; then on from step 1, again to 3, with a line that only the file has."""
    beginning = {"stage_1/v_star": [0.0, 0.5]}
    with dashboards_of(cfg, 0, [], beginning, words.say, close_seconds=300) as dashboards:
        for step in range(3):
            log(dashboards, line(step, evaluated=step == 1))
        dashboards.show_final(3, {"eval": {"gsm8k": {"greedy": 0.75}}})
    with dashboards_of(cfg, 1, [line(0)], {}, words.say, close_seconds=300) as dashboards:
        for step in range(1, 4):
            log(dashboards, line(step, reward=0.875))
