"""A*PO, stage 2: regress beta2 * ln(pi / pi_ref) on the optimal advantage (arXiv 2505.20686).

    loss_b = ( beta2 * (ln pi(y_b | x_b) - ln pi_ref(y_b | x_b)) - (r_b - V*(x_b)) )^2

The log-probs are sums over the response's tokens, up to and including its EOS (nats). The loss of a batch is the plain
mean over sequences. V* is estimated by stage 1 (value.py) and may follow the policy (refresh.py).

Leaves out, because the method has none: critic, clip, group or advantage normalisation, length normalisation, a token
denominator, a KL or an entropy term.

The loss is no metric: with beta1 != beta2 its target is unattainable, it stays near E(r - V*)^2. What does tell is
whether beta2 * D (D = ln pi - ln pi_ref of a response) follows the advantage A = r - V*. At step 0 slope and R^2 of the
one on the other are 0. At the optimum of the objective both are 1 with beta1 = beta2; with the paper's betas beta2 * D
is r - V at beta2 there, nearly 0 for each response, so that R^2 is still high and the slope near 0.

Legend: B sequences of a step, b of them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from astar_megatron.algorithm.metrics import LogprobSums, drift, regression
from astar_megatron.algorithm.objective import Columns, Need, Objective, ResponseTokens
from astar_megatron.algorithm.refresh import LiveVStar
from astar_megatron.config import AstarConfig, RunConfig
from astar_megatron.types import Rollout

_ROUNDING = 1e-9  # of V, where all samples of a prompt have the same reward


def residual(logprob: Tensor, reference_logprob: Tensor, advantage: Tensor, beta2: float) -> Tensor:
    """Return beta2 * (logprob - reference_logprob) - advantage, [B]; all three are [B]. At step 0 it is V* - r.

    Raises ValueError where the shapes differ: [B] and [B, 1] would broadcast to [B, B] in silence.
    """
    shapes = {tuple(tensor.shape) for tensor in (logprob, reference_logprob, advantage)}
    if len(shapes) != 1 or logprob.dim() != 1:
        raise ValueError(
            "loss: expected logprob, reference_logprob and advantage of one shape [B], got "
            f"{tuple(logprob.shape)}, {tuple(reference_logprob.shape)}, {tuple(advantage.shape)}"
        )
    if not (beta2 > 0 and math.isfinite(beta2)):
        raise ValueError(f"beta2: expected a positive finite number, got {beta2}; the paper uses 1e-3")
    return beta2 * (logprob - reference_logprob) - advantage


def astar_loss(logprob: Tensor, reference_logprob: Tensor, advantage: Tensor, beta2: float) -> Tensor:
    """Return the squared residual of each sequence, [B]; `advantage` is r - V*. Its mean is the loss of A*PO."""
    return residual(logprob, reference_logprob, advantage, beta2).square()


def fit_of(logprob: Tensor, reference_logprob: Tensor, advantage: Tensor, beta2: float) -> dict[str, float]:
    """Return mean and deviation of the `residual`, and the line of beta2 * ln(pi / pi_ref) on the advantage."""
    error = residual(logprob, reference_logprob, advantage, beta2)
    line = regression(advantage, beta2 * (logprob - reference_logprob))
    return {
        "residual_mean": float(error.mean()),
        "residual_std": float(error.std(correction=0)),
        "slope": line.slope,
        "r_squared": line.r_squared,
    }


def importance_weight(logprob_train: Tensor, logprob_rollout: Tensor, cap: float) -> Tensor:
    """Return min(cap, pi_train / pi_rollout) of whole sequences, [B], detached: it weighs the squared loss.

    For off-policy data only. Exactly 1 where the two summed log-probs [B] are equal. `cap` is at least 1.
    """
    if logprob_train.shape != logprob_rollout.shape or logprob_train.dim() != 1:
        raise ValueError(
            "importance_weight: expected two log-probs of one shape [B], got "
            f"{tuple(logprob_train.shape)} and {tuple(logprob_rollout.shape)}"
        )
    if not cap >= 1:
        raise ValueError(f"importance_weight: expected a cap of at least 1, got {cap}; below it scales on-policy data")
    ratio = (logprob_train - logprob_rollout).detach()
    # the minimum is taken before exp, so that a ratio of e^1000 is the cap and not an overflow
    return ratio.clamp(max=math.log(cap)).exp().clamp(max=cap)


def weights_of(weights: Tensor) -> dict[str, float]:
    """Return the mean of weights [B], and how many equal ones would be worth as much: (sum w)^2 / (B sum w^2)."""
    scaled = weights / weights.max()  # else squares vanish; NaN where all weights have
    share = scaled.sum().square() / (len(weights) * scaled.square().sum())
    return {"weight_mean": float(weights.mean()), "effective_share": float(share)}


@dataclass(frozen=True, slots=True, kw_only=True)
class SquaredResidual:
    """What losses of squared residuals have in common; see objective.Loss.

    `scale` pg divides the gradient by 2 beta2, which makes it a policy gradient's.
    """

    beta2: float
    scale: Literal["paper", "pg"] = "paper"
    needs: frozenset[Need] = frozenset()

    @property
    def gradient_scale(self) -> float:
        return 1.0 if self.scale == "paper" else 1.0 / (2.0 * self.beta2)


@dataclass(frozen=True, slots=True, kw_only=True)
class AstarLoss(SquaredResidual):
    """Columns [b]: `reward`, `v_star`, `rollout_logprob`."""

    importance_cap: float | None = None  # weigh each loss by min(cap, pi / the engine's pi) of its response

    def __call__(self, tokens: ResponseTokens, columns: Mapping[str, Tensor]) -> Tensor:
        advantage = (columns["reward"] - columns["v_star"]).float()
        losses = astar_loss(tokens.sums, tokens.reference_sums, advantage, self.beta2)
        if self.importance_cap is None:
            return losses
        return importance_weight(tokens.sums, columns["rollout_logprob"].float(), self.importance_cap) * losses


class Astar(Objective):
    """See objective.Objective. `v_star` is that of stage 1, which rewards of training refresh where it has a decay.

    `at_beta2` is V of the same samples with beta2 in beta1's place, by uid: see `metrics`.
    """

    def __init__(
        self,
        cfg: AstarConfig,
        v_star: LiveVStar,
        scale: Literal["paper", "pg"] = "paper",
        at_beta2: Mapping[str, float] | None = None,
    ) -> None:
        self.loss: AstarLoss = AstarLoss(beta2=cfg.beta2, importance_cap=cfg.importance_cap, scale=scale)
        self._v_star, self._at_beta2 = v_star, at_beta2 or {}

    def columns(self, rollouts: Sequence[Rollout]) -> Columns:
        """Return reward, v_star and rollout_logprob [B] in float64."""
        values = {
            "reward": [rollout.score for rollout in rollouts],
            "v_star": [self._v_star[rollout.prompt.uid] for rollout in rollouts],
            "rollout_logprob": [rollout.logprob for rollout in rollouts],
        }
        return Columns(sequences={name: torch.tensor(column, dtype=torch.float64) for name, column in values.items()})

    def metrics(
        self, rollouts: Sequence[Rollout], columns: Mapping[str, Tensor], sums: LogprobSums
    ) -> dict[str, float]:
        """Return `metrics.drift`, `fit_of`, `unstable_share` and, where responses are weighed, `weights_of`.

        `unstable_share` is that of prompts whose V* lies above V at beta2. Over samples of the reference the regression
        has a fixed point that D returns to only where V* lies below (arXiv 2605.28150). V falls in beta, so with
        beta1 > beta2 it does, but for a V* that was refreshed.
        """
        return {
            "v_star_mean": sum(columns["v_star"].tolist()) / len(rollouts),
            "unstable_share": self._unstable_share(rollouts),
            "v_star_shift": self._v_star.shift(rollout.prompt.uid for rollout in rollouts),
            **drift(rollouts, sums),
            **fit_of(sums.logprobs, sums.reference, columns["reward"] - columns["v_star"], self.loss.beta2),
            **self._weights(sums.logprobs, columns["rollout_logprob"]),
        }

    def _weights(self, logprobs: Tensor, rollout_logprobs: Tensor) -> dict[str, float]:
        cap = self.loss.importance_cap
        return {} if cap is None else weights_of(importance_weight(logprobs, rollout_logprobs, cap))

    def _unstable_share(self, rollouts: Sequence[Rollout]) -> float:
        uids = [rollout.prompt.uid for rollout in rollouts if rollout.prompt.uid in self._at_beta2]
        above = sum(self._v_star[uid] > self._at_beta2[uid] + _ROUNDING for uid in uids)
        return above / len(uids) if uids else math.nan

    def learn(self, rollouts: Sequence[Rollout], health: Mapping[str, float]) -> None:
        """Refresh V* by the rewards: after the step that they were in, or V* would depend on its own responses."""
        self._v_star.add((rollout.prompt.uid, rollout.reward) for rollout in rollouts if rollout.reward is not None)

    def state(self) -> dict[str, Any]:
        return {"v_star": self._v_star.state()}

    def restore(self, progress: Mapping[str, Any]) -> None:
        self._v_star.restore(progress.get("v_star", {}))


def astar_of(
    cfg: RunConfig, v_star: Mapping[str, float], samples: Mapping[str, int], at_beta2: Mapping[str, float]
) -> Astar:
    """Return the method from V* of stage 1, the number of samples behind it, and V at beta2, all by uid."""
    live = LiveVStar(v_star, samples, cfg.astar.beta1, cfg.astar.refresh_decay)
    own = cfg.astar.model_copy(update={"importance_cap": cfg.importance_cap})
    return Astar(own, live, cfg.optim.loss_scale, at_beta2)
