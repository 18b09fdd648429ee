"""How far the policy is from the reference on a step's rollouts, and least-squares lines.

KL(pi || pi_ref) and the entropy of pi are estimated from the sampled responses alone, y ~ pi, by D = ln pi - ln pi_ref:

    KL of a response = mean of D             KL a token = sum of D / sum of response tokens
    entropy a token  = - sum of ln pi(y|x) / sum of response tokens

The first is unbiased, and so are sums and counts of the two others; noise makes a KL negative now and then. They hold
for the mini-batch whose weights drew the rollouts, at the sampling temperature and with sampling.top_p = 1.

Legend: B sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from astar_megatron.types import Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class LogprobSums:
    """What a step found of its rollouts: sums of log-probs, [B], nats."""

    logprobs: torch.Tensor  # of the policy
    reference: torch.Tensor  # of the reference
    on_policy: int  # so many, the first, were scored by the weights that drew them


@dataclass(frozen=True, slots=True, kw_only=True)
class Regression:
    """Least squares y ~ slope * x + a constant. NaN where undefined: slope of a constant x, R^2 of it too."""

    slope: float
    r_squared: float


def regression(x: torch.Tensor, y: torch.Tensor) -> Regression:
    """Return the least-squares line of `y` [B] on `x` [B], in float64.

    A constant y has slope 0 and R^2 0 (nothing of it is explained). Raises ValueError for other shapes or B = 0.
    """
    if x.shape != y.shape or x.dim() != 1 or len(x) == 0:
        raise ValueError(f"regression: expected two tensors [B], B >= 1, got {tuple(x.shape)} and {tuple(y.shape)}")
    x, y = x.detach().to(torch.float64), y.detach().to(torch.float64)
    dx, dy = x - x.mean(), y - y.mean()
    if not bool((x != x[0]).any()):
        return Regression(slope=float("nan"), r_squared=float("nan"))
    if not bool((y != y[0]).any()):
        return Regression(slope=0.0, r_squared=0.0)
    slope = (dx * dy).sum() / dx.square().sum()
    r_squared = (dx * dy).sum().square() / (dx.square().sum() * dy.square().sum())
    return Regression(slope=float(slope), r_squared=float(r_squared.clamp(max=1.0)))


def drift(rollouts: Sequence[Rollout], sums: LogprobSums) -> dict[str, float]:
    """Return `divergence` of a step's rollouts as metrics."""
    num_tokens = torch.tensor([len(rollout.token_ids) for rollout in rollouts])
    return divergence(sums.logprobs, sums.reference, num_tokens, sums.on_policy)


def divergence(
    logprob: torch.Tensor, reference_logprob: torch.Tensor, response_tokens: torch.Tensor, on_policy: int
) -> dict[str, float]:
    """Return numbers of D from [B] sums of log-probs (nats) and lengths of the responses.

    The first `on_policy` sequences were scored by the weights that drew them, and the last three numbers are of these:
    where rollouts lag, earlier weights drew them, and the numbers are biased. NaN in, NaN out.
    """
    logratio = (logprob - reference_logprob).double()
    low, median, high = logratio.quantile(torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)).tolist()
    num_tokens = float(response_tokens[:on_policy].sum())
    return {
        "logratio_mean": float(logratio.mean()),  # nats
        "logratio_std": float(logratio.std(correction=0)),
        "logratio_p05": low,
        "logratio_p50": median,
        "logratio_p95": high,
        "logratio_max": float(logratio.abs().max()),  # exactly 0 before the first optimiser step
        "kl_sequence": float(logratio[:on_policy].mean()),  # nats a response
        "kl_token": _ratio(logratio[:on_policy].sum(), num_tokens),  # nats a response token
        "entropy": _ratio(-logprob[:on_policy].sum(), num_tokens),  # nats a response token
    }


def _ratio(total: torch.Tensor, count: float) -> float:
    return float(total) / count if count else float("nan")
