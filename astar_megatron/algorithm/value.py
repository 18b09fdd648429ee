"""V*: the optimal value of a prompt, from rewards of the reference's own samples.

    V*(x) = beta1 * ln E_{y ~ pi_ref} exp(r(x, y) / beta1)         (A*PO, arXiv 2505.20686, stage 1)

estimated by the sample mean inside the logarithm. beta1 -> inf is the mean of the rewards, beta1 -> 0 their maximum.
Everything is a logsumexp in float64: exp(r / beta1) itself overflows for beta1 < r / 709.

With w = exp(r / beta1), the delta method gives the estimate's standard error, beta1 * sd(w) / (sqrt(N) * E[w]), and its
bias, about -beta1 * Var(w) / (2 N * E[w]^2). Both are 0 where all rewards are equal, which says nothing: of N = 8 wrong
responses the pass rate may still be .36. For rewards of 0 and 1 V* is monotone in the pass rate, so the exact interval
of Clopper and Pearson (Biometrika 26, 1934) for the pass rate maps to an exact one for V*.

Legend: N samples of a prompt; `...` any leading shape.
"""

import math

import torch


def v_star(rewards: torch.Tensor, beta1: float, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Return V* [...] in float64 of `rewards` [..., N]: beta1 * (logsumexp(r / beta1) - ln N).

    `mask` [..., N] (bool) says which samples there are; none: all. Each prompt needs at least one. Raises ValueError.
    """
    _check_beta1(beta1)
    if rewards.dim() == 0 or rewards.shape[-1] == 0:
        raise ValueError(f"v_star: expected rewards [..., N] with N >= 1, got shape {tuple(rewards.shape)}")
    scaled = rewards.to(torch.float64) / beta1  # [..., N]
    if mask is None:
        return beta1 * (torch.logsumexp(scaled, dim=-1) - math.log(rewards.shape[-1]))
    if mask.shape != rewards.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"v_star: expected a bool mask of shape {tuple(rewards.shape)}, got {mask.dtype} {tuple(mask.shape)}"
        )
    count = mask.sum(dim=-1)  # [...]
    if bool((count == 0).any()):
        raise ValueError(f"v_star: {int((count == 0).sum())} prompts have no sample; run `astar sweep` for them first")
    scaled = scaled.masked_fill(~mask, -math.inf)
    return beta1 * (torch.logsumexp(scaled, dim=-1) - count.to(torch.float64).log())


def v_star_from_pass_rate(k: torch.Tensor | float, n: torch.Tensor | float, beta1: float) -> torch.Tensor:
    """Return V* (float64) of binary rewards with `k` ones in `n`: beta1 * ln(1 + (k/n) * (e^(1/beta1) - 1)).

    `k` and `n` are numbers or tensors that broadcast; k need not be whole, so k = p, n = 1 maps a pass rate.
    """
    _check_beta1(beta1)
    passed, total = torch.as_tensor(k, dtype=torch.float64), torch.as_tensor(n, dtype=torch.float64)
    if bool((total <= 0).any()) or bool((passed < 0).any()) or bool((passed > total).any()):
        raise ValueError(f"v_star_from_pass_rate: expected 0 <= k <= n and n > 0, got k = {k}, n = {n}")
    rate = passed / total
    # ln((1 - p) + p * e^(1/beta1)) without forming the exponential
    return beta1 * torch.logaddexp((1 - rate).log(), rate.log() + 1 / beta1)


def standard_error(rewards: torch.Tensor, beta1: float) -> torch.Tensor:
    """Return the standard error [...], float64, of V* of `rewards` [..., N], by the delta method, NaN for N = 1."""
    return beta1 * _relative_variance(rewards, beta1).sqrt()


def bias_correction(rewards: torch.Tensor, beta1: float) -> torch.Tensor:
    """Return what to add [...], float64, to V* of `rewards` [..., N] against its bias of order 1 / N; 0 for N = 1."""
    return (beta1 * _relative_variance(rewards, beta1) / 2).nan_to_num(nan=0.0)


def pass_rate_interval(k: torch.Tensor, n: torch.Tensor, level: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ends [...], float64, of Clopper and Pearson's interval of a pass rate; `k` passes in `n`, integers.

    It covers the true rate with probability `level` or more, whatever that rate is. Costs k.numel() * max(n) a step of
    a bisection: give each pair (k, n) once.
    """
    if not 0 < level < 1:
        raise ValueError(f"pass_rate_interval: expected a level between 0 and 1, got {level}; 0.95 is usual")
    if bool((n < 1).any()) or bool((k < 0).any()) or bool((k > n).any()):
        raise ValueError(f"pass_rate_interval: expected 0 <= k <= n and n >= 1, got k = {k}, n = {n}")
    tail = math.log((1 - level) / 2)
    return _rate_with_tail(k, n, tail), 1 - _rate_with_tail(n - k, n, tail)


def _rate_with_tail(k: torch.Tensor, n: torch.Tensor, log_tail: float) -> torch.Tensor:
    """The rate p at which P(k or more of n) is e^log_tail; 0 for k = 0."""
    passed, total = k.to(torch.float64)[..., None], n.to(torch.float64)[..., None]
    i = torch.arange(int(n.max()) + 1 if n.numel() else 1, dtype=torch.float64)
    left = (total - i).clamp(min=0)
    choose = torch.lgamma(total + 1) - torch.lgamma(i + 1) - torch.lgamma(left + 1)
    choose = choose.masked_fill((i < passed) | (i > total), -math.inf)  # [..., max(n) + 1]
    low, high = torch.zeros_like(total), torch.ones_like(total)
    for _ in range(60):
        p = (low + high) / 2
        above = (choose + i * p.log() + left * (1 - p).log()).logsumexp(dim=-1, keepdim=True) > log_tail
        low, high = torch.where(above, low, p), torch.where(above, p, high)
    return torch.where(passed == 0, 0.0, (low + high) / 2)[..., 0]


def _relative_variance(rewards: torch.Tensor, beta1: float) -> torch.Tensor:
    """Var(w) / (N * E[w]^2) of w = exp(r / beta1), the variance of the logarithm of their mean; NaN for N = 1."""
    _check_beta1(beta1)
    scaled = rewards.to(torch.float64) / beta1
    weights = (scaled - scaled.amax(dim=-1, keepdim=True)).exp()
    variance = weights.var(dim=-1) if rewards.shape[-1] > 1 else torch.full(rewards.shape[:-1], math.nan).double()
    return variance / (rewards.shape[-1] * weights.mean(dim=-1).square())


def _check_beta1(beta1: float) -> None:
    if not (beta1 > 0 and math.isfinite(beta1)):
        raise ValueError(f"beta1: expected a positive finite number, got {beta1}; the paper uses 0.5")
