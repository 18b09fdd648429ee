"""REBEL: regress the difference of two responses' log-ratios on that of their rewards (arXiv 2404.16767, equation 3).

    loss = ( (D(y) - D(y')) / eta - (r(y) - r(y')) )^2        D = ln pi - ln pi_old, summed over a response's tokens

of two responses y, y' to a prompt, drawn by pi_old, the policy before the step. What depends on the prompt alone, its
value and the partition function, falls out of the difference.

Each of the two is a sequence of its own with the whole loss of its pair, in which the other counts as a constant: the
sum of the two gradients is that of the pair's loss, and the mean over pairs is half the sum over sequences.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from astar_megatron.algorithm.metrics import LogprobSums, drift
from astar_megatron.algorithm.objective import Columns, Need, Objective, ResponseTokens
from astar_megatron.config import RebelConfig
from astar_megatron.types import Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class RebelLoss:
    """See objective.Loss. Columns: `reward` and `peer_reward` [b], `peer` and `peer_shift` (see objective.Need)."""

    eta: float
    gradient_scale: float = 2.0  # over n sequences, of n / 2 pairs
    needs: frozenset[Need] = frozenset({"old", "peer_shift"})

    def __call__(self, tokens: ResponseTokens, columns: Mapping[str, Tensor]) -> Tensor:
        shift = tokens.sums - tokens.total(tokens.old_logprobs)
        difference = (shift - columns["peer_shift"].float()) / self.eta
        return (difference - (columns["reward"] - columns["peer_reward"]).float()).square()


class Rebel(Objective):
    """See objective.Objective. The responses of a pair lie beside each other in a batch."""

    def __init__(self, cfg: RebelConfig) -> None:
        self.loss: RebelLoss = RebelLoss(eta=cfg.eta)

    def columns(self, rollouts: Sequence[Rollout]) -> Columns:
        rewards = torch.tensor([rollout.score for rollout in rollouts], dtype=torch.float64)
        peer = torch.arange(len(rollouts)) ^ 1  # 1, 0, 3, 2, ...
        return Columns(sequences={"reward": rewards, "peer_reward": rewards[peer], "peer": peer})

    def metrics(
        self, rollouts: Sequence[Rollout], columns: Mapping[str, Tensor], sums: LogprobSums
    ) -> Mapping[str, float]:
        """Return `metrics.drift`, and the share of pairs whose rewards are equal: they only hold the policy back."""
        first, second = (torch.tensor([rollout.score for rollout in rollouts[i::2]]) for i in (0, 1))
        tied = float((first == second).double().mean())
        return {"flat_groups": tied, **drift(rollouts, sums)}
