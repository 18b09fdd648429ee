"""SPO: one response a prompt against a value that is tracked over the steps (arXiv 2509.13232, sections 3.2 to 3.4).

    value       v(x) = a / (a + b), a beta distribution's mean; at first (k + 1/2) / (N + 1) by k, the summed rewards
                of N samples of stage 1, and a + b = 1 / (1 - least_decay)
    decay       d(x) = 2^(-D(x) / half_life), not below least_decay, not above most_decay
    on reward   a <- d(x) a + r,  b <- d(x) b + 1 - r          after the step that the reward was in
    advantage   A = (r - v(x) - mean) / standard deviation, both over the batch
    priority    sqrt(v(x) (1 - v(x))) + exploration

A is that of all tokens of the response in the clipped policy gradient of clipped.py. D(x) is how far the policy has
moved since the one that last drew for x. Here it is the change of the KL to the reference (nats a token, of a batch),
which needs no forward pass of its own. The authors' recipe (verl-recipe, spo/) scores the last response to x again and
takes the mean of |change of ln pi| over its tokens. That is larger, above all near the reference: with equal
`half_life` the decay here is nearer to `most_decay`, so the tracker remembers more. Rewards are taken as the paper has
them, between 0 and 1: lower ones count as 0.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from astar_megatron.algorithm.clipped import ClippedLoss, TokenMean, clipped_loss
from astar_megatron.algorithm.metrics import LogprobSums, drift
from astar_megatron.algorithm.objective import Columns, Objective
from astar_megatron.config import SpoConfig
from astar_megatron.types import Rollout

_LEAST_DEVIATION = 1e-6  # added: a batch whose advantages are equal has advantages of 0, not NaN


class ValueTracker:
    """The value of each prompt. `success` is the mean of its `samples` of stage 1, by uid; without any it is 1/2."""

    def __init__(self, cfg: SpoConfig, success: Mapping[str, float], samples: Mapping[str, int]) -> None:
        self._cfg, self._success, self._samples = cfg, success, samples
        self._moved: dict[str, tuple[float, float, float]] = {}  # a, b, and the KL to the reference at that time
        self._values: dict[str, float] = {}  # v of what was asked for and has not moved since

    def __getitem__(self, uid: str) -> float:
        if uid not in self._values:
            a, b, _ = self._beta(uid)
            self._values[uid] = a / (a + b)
        return self._values[uid]

    def add(self, uid: str, reward: float, kl_token: float) -> None:
        """Take in a reward that was drawn when the policy was `kl_token` from the reference (nats a token)."""
        a, b, last = self._beta(uid)
        moved = abs(kl_token - last) if math.isfinite(kl_token) else 0.0
        decay = min(max(2.0 ** (-moved / self._cfg.half_life), self._cfg.least_decay), self._cfg.most_decay)
        success = _success(reward)
        here = kl_token if math.isfinite(kl_token) else last
        self._moved[uid] = decay * a + success, decay * b + 1.0 - success, here
        self._values.pop(uid, None)

    def state(self) -> dict[str, Any]:
        """Return what was learnt since stage 1, ready for JSON."""
        return {uid: list(entry) for uid, entry in self._moved.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._moved = {uid: (float(a), float(b), float(last)) for uid, (a, b, last) in state.items()}
        self._values.clear()

    def _beta(self, uid: str) -> tuple[float, float, float]:
        if uid in self._moved:
            return self._moved[uid]
        weight, count = 1.0 / (1.0 - self._cfg.least_decay), self._samples.get(uid, 0)
        value = (self._success.get(uid, 0.5) * count + 0.5) / (count + 1)
        return weight * value, weight * (1.0 - value), 0.0


def _success(reward: float) -> float:
    return min(max(reward, 0.0), 1.0)


class Spo(Objective):
    """See objective.Objective. `success` and `samples` as in ValueTracker."""

    chooses_prompts = True

    def __init__(
        self, cfg: SpoConfig, mean: TokenMean, success: Mapping[str, float], samples: Mapping[str, int]
    ) -> None:
        self._cfg, self._mean, self._tracker = cfg, mean, ValueTracker(cfg, success, samples)
        self.loss: ClippedLoss = clipped_loss(cfg)

    def columns(self, rollouts: Sequence[Rollout]) -> Columns:
        surprise = [_success(rollout.score) - self._tracker[rollout.prompt.uid] for rollout in rollouts]
        raw = torch.tensor(surprise, dtype=torch.float64)
        advantage = (raw - raw.mean()) / (raw.std(correction=0) + _LEAST_DEVIATION)
        return self._mean.columns(rollouts, advantage=advantage)

    def metrics(
        self, rollouts: Sequence[Rollout], columns: Mapping[str, Tensor], sums: LogprobSums
    ) -> Mapping[str, float]:
        """Return `metrics.drift`, the mean of v over the batch, and how far v was from the rewards (mean square)."""
        values = torch.tensor([self._tracker[rollout.prompt.uid] for rollout in rollouts], dtype=torch.float64)
        rewards = torch.tensor([_success(rollout.score) for rollout in rollouts], dtype=torch.float64)
        return {
            "value_mean": float(values.mean()),
            "value_error": float((rewards - values).square().mean()),
            **drift(rollouts, sums),
        }

    def learn(self, rollouts: Sequence[Rollout], health: Mapping[str, float]) -> None:
        for rollout in rollouts:
            if rollout.reward is not None:
                self._tracker.add(rollout.prompt.uid, rollout.reward, health["kl_token"])

    def state(self) -> dict[str, Any]:
        return {"values": self._tracker.state()}

    def restore(self, progress: Mapping[str, Any]) -> None:
        self._tracker.restore(progress.get("values", {}))

    def priorities(self, uids: Sequence[str]) -> list[float]:
        values = torch.tensor([self._tracker[uid] for uid in uids], dtype=torch.float64)
        return ((values * (1.0 - values)).sqrt() + self._cfg.exploration).tolist()
