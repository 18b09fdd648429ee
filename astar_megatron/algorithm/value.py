"""V*: the optimal value of a prompt, from rewards of the reference's own samples.

    V*(x) = beta1 * ln E_{y ~ pi_ref} exp(r(x, y) / beta1)         (A*PO, arXiv 2505.20686, stage 1)

estimated by the sample mean inside the logarithm. beta1 -> inf is the mean of the rewards, beta1 -> 0 their maximum.
All in float64, by expm1 and log1p of r minus the largest: exp(r / beta1) itself overflows for beta1 < r / 709, and is
rounded to 1 for beta1 > 1e16. So both limits hold for beta1 up to 1e300.

With w = exp(r / beta1), the delta method gives the estimate's standard error, beta1 * sd(w) / (sqrt(N) * E[w]), and its
bias, about -beta1 * Var(w) / (2 N * E[w]^2). Both are 0 where all rewards are equal, which says nothing: of N = 8 wrong
responses the pass rate may still be .36. For rewards of 0 and 1 V* is monotone in the pass rate, so the exact interval
of Clopper and Pearson (Biometrika 26, 1934) for the pass rate maps to an exact one for V*.

Legend: N samples of a prompt; `...` any leading shape.
"""

import math

import torch


def v_star(rewards: torch.Tensor, beta1: float, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Return V* [...] in float64 of `rewards` [..., N]: max + beta1 * ln E[e^((r - max) / beta1)].

    `weight` [..., N] says how much each sample counts (False or 0: not at all); none: all the same. Each prompt needs
    one that counts. Raises ValueError.
    """
    _check_beta1(beta1)
    if rewards.dim() == 0 or rewards.shape[-1] == 0:
        raise ValueError(f"v_star: expected rewards [..., N] with N >= 1, got shape {tuple(rewards.shape)}")
    if weight is not None and (weight.shape[-1] != rewards.shape[-1] or bool((weight < 0).any())):
        raise ValueError(
            f"v_star: expected weights [..., N] >= 0, got {tuple(weight.shape)} for {tuple(rewards.shape)}"
        )
    counted = torch.ones_like(rewards, dtype=torch.float64) if weight is None else weight.to(torch.float64)
    total = counted.sum(dim=-1)  # [...]
    if bool((total == 0).any()):
        raise ValueError(f"v_star: {int((total == 0).sum())} prompts have no sample; run `astar sweep` for them first")
    values = rewards.to(torch.float64)
    top = values.masked_fill(counted == 0, -math.inf).amax(dim=-1, keepdim=True)  # [..., 1]
    # E[w] - 1 and not E[w], which is rounded to 1 where beta1 is large
    less = (((values - top) / beta1).clamp(max=0).expm1() * counted).sum(dim=-1) / total
    return top[..., 0] + beta1 * less.log1p()


def v_star_from_pass_rate(k: torch.Tensor | float, n: torch.Tensor | float, beta1: float) -> torch.Tensor:
    """Return V* (float64) of binary rewards with `k` ones in `n`: beta1 * ln(1 + (k/n) * (e^(1/beta1) - 1)).

    `k` and `n` are numbers or tensors that broadcast; k need not be whole, so k = p, n = 1 maps a pass rate.
    """
    _check_beta1(beta1)
    passed, total = torch.as_tensor(k, dtype=torch.float64), torch.as_tensor(n, dtype=torch.float64)
    if bool((total <= 0).any()) or bool((passed < 0).any()) or bool((passed > total).any()):
        raise ValueError(f"v_star_from_pass_rate: expected 0 <= k <= n and n > 0, got k = {k}, n = {n}")
    rate = passed / total
    if beta1 > 1 / 700:
        return beta1 * (rate * math.expm1(1 / beta1)).log1p()
    # The exponential would overflow; with e^(1/beta1) taken out:
    value = 1 + beta1 * torch.logaddexp(rate.log(), (1 - rate).log() - 1 / beta1)
    return torch.where(rate == 0, 0.0, value)


def standard_error(rewards: torch.Tensor, beta1: float) -> torch.Tensor:
    """Return the standard error [...], float64, of V* of `rewards` [..., N], by the delta method, NaN for N = 1."""
    _check_beta1(beta1)
    values, num_samples = rewards.to(torch.float64), rewards.shape[-1]
    if num_samples == 1:
        return torch.full(values.shape[:-1], math.nan, dtype=torch.float64)
    less = ((values - values.amax(dim=-1, keepdim=True)) / beta1).expm1()  # w - 1
    scale = max(
        1.0, beta1
    )  # w - 1 is about r / beta1 where beta1 is large, and its square may be too small for a float
    return (beta1 / scale) * (less * scale).std(dim=-1) / (math.sqrt(num_samples) * (1 + less.mean(dim=-1)))


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


def _check_beta1(beta1: float) -> None:
    if not (beta1 > 0 and math.isfinite(beta1)):
        raise ValueError(f"beta1: expected a positive finite number, got {beta1}; the paper uses 0.5")
