"""OAPL: A*PO's regression with the policy that drew a response as its reference, however old (arXiv 2602.19362).

    loss_b = ( beta2 * (ln pi(y_b | x_b) - ln pi_old(y_b | x_b)) - (r_b - V(x_b)) )^2

The optimum of max E_pi[r] - beta KL(pi || pi_old) has beta ln(pi* / pi_old) = r - V(x) for EVERY y, so the regression
needs no samples of the current policy: rollouts may lag, without importance weights. V is beta1 (logsumexp(r / beta1) -
ln n) over the response's own group, or the V* table of stage 1. Published: beta1 1, beta2 1e-3.

pi_old is the engine's policy, by its log-probs of each token, or a copy of the policy that `refresh_steps` renews. A
group may be of later policies then, and the table is of the first: such a V is not pi_old's, which costs variance, and
bias as far as the responses lag.

Legend: B sequences of a step, b of them, G groups of n.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from astar_megatron.algorithm.astar import SquaredResidual, astar_loss, fit_of
from astar_megatron.algorithm.metrics import LogprobSums, drift
from astar_megatron.algorithm.objective import Columns, Objective, ResponseTokens
from astar_megatron.algorithm.value import v_star
from astar_megatron.config import OaplConfig
from astar_megatron.types import Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class OaplLoss(SquaredResidual):
    """Columns [b]: `advantage` r - V, and `engine_logprob`, the engine's ln pi_old of responses.

    With `against_copy` pi_old is the reference.
    """

    against_copy: bool = False

    def __call__(self, tokens: ResponseTokens, columns: Mapping[str, Tensor]) -> Tensor:
        old = tokens.reference_sums if self.against_copy else columns["engine_logprob"].float()
        return astar_loss(tokens.sums, old, columns["advantage"].float(), self.beta2)


class Oapl(Objective):
    """See objective.Objective. `table` is V* by uid, which `oapl.value: table` alone reads."""

    def __init__(self, cfg: OaplConfig, table: Mapping[str, float], scale: Literal["paper", "pg"] = "paper") -> None:
        self._cfg, self._table = cfg, table
        self.loss: OaplLoss = OaplLoss(beta2=cfg.beta2, against_copy=cfg.refresh_steps is not None, scale=scale)

    def columns(self, rollouts: Sequence[Rollout]) -> Columns:
        rewards = torch.tensor([rollout.score for rollout in rollouts], dtype=torch.float64)
        engine = torch.tensor([rollout.logprob for rollout in rollouts], dtype=torch.float64)
        return Columns(sequences={"advantage": rewards - self._values(rollouts, rewards), "engine_logprob": engine})

    def metrics(
        self, rollouts: Sequence[Rollout], columns: Mapping[str, Tensor], sums: LogprobSums
    ) -> Mapping[str, float]:
        """Return `metrics.drift`, the mean of V, and `astar.fit_of` against pi_old."""
        old = sums.reference if self.loss.against_copy else columns["engine_logprob"]
        rewards = torch.tensor([rollout.score for rollout in rollouts], dtype=torch.float64)
        return {
            "value_mean": float((rewards - columns["advantage"]).mean()),
            **drift(rollouts, sums),
            **fit_of(sums.logprobs, old, columns["advantage"], self.loss.beta2),
        }

    def refreshes_reference(self, step: int) -> bool:
        return self._cfg.refresh_steps is not None and step > 0 and step % self._cfg.refresh_steps == 0

    def _values(self, rollouts: Sequence[Rollout], rewards: Tensor) -> Tensor:
        if self._cfg.value == "table":
            return torch.tensor([self._table[rollout.prompt.uid] for rollout in rollouts], dtype=torch.float64)
        groups = rewards.view(-1, self._cfg.group_size)  # [G, n]
        return v_star(groups, self._cfg.beta1).repeat_interleave(self._cfg.group_size)
