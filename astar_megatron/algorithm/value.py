"""V*: the optimal value of a prompt, from rewards of the reference's own samples.

    V*(x) = beta1 * ln E_{y ~ pi_ref} exp(r(x, y) / beta1)         (A*PO, arXiv 2505.20686, stage 1)

estimated by the sample mean inside the logarithm. beta1 -> inf is the mean of the rewards, beta1 -> 0 their maximum.
Everything is a logsumexp in float64: exp(r / beta1) itself overflows for beta1 < r / 709.
Leaves out: the bias of a logarithm of a mean (about -beta1 * Var(w) / (2 N E[w]^2), w = exp(r / beta1)) and intervals.

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


def _check_beta1(beta1: float) -> None:
    if not (beta1 > 0 and math.isfinite(beta1)):
        raise ValueError(f"beta1: expected a positive finite number, got {beta1}; the paper uses 0.5")
