"""GRPO: a response's advantage is how much better it is than the others to its prompt (arXiv 2402.03300, section 4.1).

    A_i = (r_i - mean of the group's r) / (standard deviation of the group's r)

the same for all tokens of response i, in the clipped policy gradient of clipped.py. The settings also make

- DAPO's loss (arXiv 2503.14476, equation 8): clip_high 0.28 above clip_low 0.2, kl_coef 0, loss `token`. Instead of its
  dynamic sampling, by the policy, of groups that are neither all right nor all wrong there are `filter.all_right` and
  `filter.all_wrong`, by stage 1; its penalty of overlong responses is left out;
- Dr. GRPO (arXiv 2503.20783, section 3): normalise false, kl_coef 0, loss `constant`.

A group whose rewards are equal has no advantage and teaches nothing: `flat_groups` counts them.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from astar_megatron.algorithm.clipped import ClippedLoss, TokenMean, clipped_loss
from astar_megatron.algorithm.metrics import LogprobSums, drift
from astar_megatron.algorithm.objective import Columns, Objective
from astar_megatron.config import GrpoConfig
from astar_megatron.types import Rollout

_LEAST_DEVIATION = 1e-6  # added, as in the papers' code: a group of equal rewards has advantages of 0, not NaN


def group_advantages(rewards: Tensor, *, normalise: bool) -> Tensor:
    """Return the advantages [G, n] of `rewards` [G, n], a row a prompt; the deviation is the unbiased one."""
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    return centred / (rewards.std(dim=1, keepdim=True) + _LEAST_DEVIATION) if normalise else centred


class Grpo(Objective):
    """See objective.Objective. `old_from_engine` as in ClippedLoss."""

    def __init__(self, cfg: GrpoConfig, mean: TokenMean, *, old_from_engine: bool = False) -> None:
        self._cfg, self._mean = cfg, mean
        self.loss: ClippedLoss = clipped_loss(cfg, old_from_engine=old_from_engine)

    def columns(self, rollouts: Sequence[Rollout]) -> Columns:
        advantage = group_advantages(self._groups(rollouts), normalise=self._cfg.normalise).flatten()
        return self._mean.columns(rollouts, advantage=advantage)

    def metrics(
        self, rollouts: Sequence[Rollout], columns: Mapping[str, Tensor], sums: LogprobSums
    ) -> Mapping[str, float]:
        """Return `metrics.drift`, and the share of groups whose rewards are equal."""
        groups = self._groups(rollouts)
        flat = (groups == groups[:, :1]).all(dim=1).double().mean()
        return {"flat_groups": float(flat), **drift(rollouts, sums)}

    def _groups(self, rollouts: Sequence[Rollout]) -> Tensor:
        """The rewards [G, n], a row a prompt."""
        rewards = torch.tensor([rollout.score for rollout in rollouts], dtype=torch.float64)
        return rewards.view(-1, self._cfg.group_size)
