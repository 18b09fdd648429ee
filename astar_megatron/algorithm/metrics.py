"""Health of a step. The loss is no metric: with beta1 != beta2 its target is unattainable, it stays near E(r - V*)^2.

What does tell: whether beta2 * D (D = ln pi - ln pi_ref of a response, nats) follows the advantage A = r - V*. At the
optimum of the objective the slope of beta2 * D on A is 1 and R^2 is 1; at step 0 both are 0.

Legend: B sequences.
"""

from dataclasses import dataclass

import torch


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
