"""PPO with a critic (arXiv 1707.06347), its advantages by GAE (arXiv 1506.02438), token by token of a response.

    delta_t = r_t + gamma V_{t+1} - V_t          r_t = 0 but for the last token, which has the response's reward;
    A_t = sum over l of (gamma lambda)^l delta_{t+l}          V behind the last token is 0
    R_t = A_t + V_t                              what the critic regresses on
    critic's loss_t = max( (V - R_t)^2, (clip(V, V_t - c, V_t + c) - R_t)^2 ) / 2

V_t is the critic's before the step, V the one that learns. Advantages are normalised over the tokens of the batch, to
mean 0 and deviation 1, for the clipped policy gradient of clipped.py. A response that the token limit cut ends there.

Legend: B sequences of a step, N response tokens of them in order, b and r of those at hand.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from astar_megatron.algorithm.clipped import ClippedLoss, TokenMean, clipped_loss
from astar_megatron.algorithm.metrics import LogprobSums, drift
from astar_megatron.algorithm.objective import Columns, Need, Objective, ResponseTokens
from astar_megatron.config import PpoConfig
from astar_megatron.types import Rollout

_LEAST_DEVIATION = 1e-8  # added: equal advantages are 0, not NaN


def advantages_and_returns(
    rewards: Tensor, values: Tensor, lengths: Sequence[int], *, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Return A and R [N] of `rewards` [B] and `values` [N], float64, not normalised."""
    advantages = []
    for reward, of_tokens in zip(rewards.tolist(), values.split(list(lengths)), strict=True):
        later, following, reversed_ = 0.0, 0.0, []
        for t, value in enumerate(reversed(of_tokens.tolist())):
            delta = (reward if t == 0 else 0.0) + gamma * following - value
            later, following = delta + gamma * gae_lambda * later, value
            reversed_.append(later)
        advantages += reversed_[::-1]
    advantage = torch.tensor(advantages, dtype=torch.float64, device=values.device)
    return advantage, advantage + values


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueLoss:
    """See objective.Loss; the tokens' log-probs are values here. Columns: `return`, `old_value` [r], `token_weight`."""

    clip: float
    gradient_scale: float = 1.0
    needs: frozenset[Need] = frozenset()

    def __call__(self, tokens: ResponseTokens, columns: Mapping[str, Tensor]) -> Tensor:
        old, target = columns["old_value"].float(), columns["return"].float()
        near = old + (tokens.logprobs - old).clamp(-self.clip, self.clip)
        losses = torch.maximum((tokens.logprobs - target).square(), (near - target).square()) / 2
        return tokens.total(losses) * columns["token_weight"].float()


@dataclass(frozen=True, slots=True, kw_only=True)
class PpoLoss:
    """See objective.CriticLoss. Columns: `reward` and `token_weight` [b], and what `with_values` adds."""

    policy: ClippedLoss
    value: ValueLoss
    gamma: float
    gae_lambda: float
    gradient_scale: float = 1.0

    @property
    def needs(self) -> frozenset[Need]:
        return self.policy.needs | frozenset[Need]({"values"})

    def __call__(self, tokens: ResponseTokens, columns: Mapping[str, Tensor]) -> Tensor:
        return self.policy(tokens, columns)

    def with_values(self, rewards: Tensor, values: Tensor, lengths: Sequence[int]) -> dict[str, Tensor]:
        advantage, target = advantages_and_returns(
            rewards, values, lengths, gamma=self.gamma, gae_lambda=self.gae_lambda
        )
        deviation = advantage.std(correction=0) + _LEAST_DEVIATION
        return {"token_advantage": (advantage - advantage.mean()) / deviation, "return": target, "old_value": values}


class Ppo(Objective):
    """See objective.Objective. `old_from_engine` as in ClippedLoss."""

    def __init__(self, cfg: PpoConfig, mean: TokenMean, *, old_from_engine: bool = False) -> None:
        self._mean = mean
        self.loss: PpoLoss = PpoLoss(
            policy=clipped_loss(cfg, old_from_engine=old_from_engine),
            value=ValueLoss(clip=cfg.value_clip),
            gamma=cfg.gamma,
            gae_lambda=cfg.gae_lambda,
        )

    def columns(self, rollouts: Sequence[Rollout]) -> Columns:
        rewards = torch.tensor([rollout.score for rollout in rollouts], dtype=torch.float64)
        return self._mean.columns(rollouts, reward=rewards)

    def metrics(
        self, rollouts: Sequence[Rollout], columns: Mapping[str, Tensor], sums: LogprobSums
    ) -> Mapping[str, float]:
        """Return `metrics.drift`; what the critic did is in StepStats."""
        return drift(rollouts, sums)
