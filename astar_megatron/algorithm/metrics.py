"""Health of a step. The loss is no metric: with beta1 != beta2 its target is unattainable, it stays near E(r - V*)^2.

What does tell: whether beta2 * D (D = ln pi - ln pi_ref of a response, nats) follows the advantage A = r - V*. At the
optimum of the objective the slope of beta2 * D on A is 1 and R^2 is 1; at step 0 both are 0.

KL(pi || pi_ref) and the entropy of pi are estimated from the sampled responses alone, y ~ pi:

    KL of a response = mean of D             KL a token = sum of D / sum of response tokens
    entropy a token  = - sum of ln pi(y|x) / sum of response tokens

The first is unbiased, and so are sums and counts of the two others; noise makes a KL negative now and then. They hold
for the mini-batch whose weights drew the rollouts, at the sampling temperature and with sampling.top_p = 1.

Legend: B sequences.
"""

from dataclasses import dataclass

import torch

from astar_megatron.algorithm.loss import residual
from astar_megatron.types import Health


@dataclass(frozen=True, slots=True, kw_only=True)
class Regression:
    """Least squares y ~ intercept + slope * x. NaN where undefined: slope of a constant x, R^2 of it too."""

    slope: float
    intercept: float
    r_squared: float


def regression(x: torch.Tensor, y: torch.Tensor) -> Regression:
    """Return the least-squares line of `y` [B] on `x` [B], in float64; here x = A and y = beta2 * D.

    A constant y has slope 0 and R^2 0 (nothing of it is explained). Raises ValueError for other shapes or B = 0.
    """
    if x.shape != y.shape or x.dim() != 1 or len(x) == 0:
        raise ValueError(f"regression: expected two tensors [B], B >= 1, got {tuple(x.shape)} and {tuple(y.shape)}")
    x, y = x.detach().to(torch.float64), y.detach().to(torch.float64)
    dx, dy = x - x.mean(), y - y.mean()
    if not bool((x != x[0]).any()):
        return Regression(slope=float("nan"), intercept=float("nan"), r_squared=float("nan"))
    if not bool((y != y[0]).any()):
        return Regression(slope=0.0, intercept=float(y[0]), r_squared=0.0)
    slope = (dx * dy).sum() / dx.square().sum()
    r_squared = (dx * dy).sum().square() / (dx.square().sum() * dy.square().sum())
    return Regression(
        slope=float(slope), intercept=float(y.mean() - slope * x.mean()), r_squared=float(r_squared.clamp(max=1.0))
    )


def health(
    *,
    logprob: torch.Tensor,
    reference_logprob: torch.Tensor,
    advantage: torch.Tensor,
    response_tokens: torch.Tensor,
    beta2: float,
    on_policy: int,
) -> Health:
    """Return the health of a batch from [B] sums of log-probs (nats), advantages A and lengths of the responses.

    The first `on_policy` sequences were scored by the weights that drew them. NaN in, NaN out.
    """
    logratio = (logprob - reference_logprob).double()
    error = residual(logprob, reference_logprob, advantage, beta2)
    line = regression(advantage, beta2 * logratio)
    low, median, high = logratio.quantile(torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)).tolist()
    num_tokens = float(response_tokens[:on_policy].sum())
    return Health(
        logratio_mean=float(logratio.mean()),
        logratio_std=float(logratio.std(correction=0)),
        logratio_p05=low,
        logratio_p50=median,
        logratio_p95=high,
        logratio_max=float(logratio.abs().max()),
        kl_sequence=float(logratio[:on_policy].mean()),
        kl_token=_ratio(logratio[:on_policy].sum(), num_tokens),
        entropy=_ratio(-logprob[:on_policy].sum(), num_tokens),
        residual_mean=float(error.mean()),
        residual_std=float(error.std(correction=0)),
        slope=line.slope,
        r_squared=line.r_squared,
    )


def _ratio(total: torch.Tensor, count: float) -> float:
    return float(total) / count if count else float("nan")
