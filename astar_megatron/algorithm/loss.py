"""The loss of A*PO, one number a sequence.

    loss_b = ( beta2 * (ln pi(y_b | x_b) - ln pi_ref(y_b | x_b)) - (r_b - V*(x_b)) )^2     (arXiv 2505.20686, stage 2)

The log-probs are sums over the response's tokens, up to and including its EOS (nats). The loss of a batch is the plain
mean over sequences. Leaves out, because the method has none: critic, clip, group or advantage normalisation, length
normalisation, a token denominator, a KL or an entropy term.

Legend: B sequences.
"""

import math

import torch


def residual(
    logprob: torch.Tensor, reference_logprob: torch.Tensor, advantage: torch.Tensor, beta2: float
) -> torch.Tensor:
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


def astar_loss(
    logprob: torch.Tensor, reference_logprob: torch.Tensor, advantage: torch.Tensor, beta2: float
) -> torch.Tensor:
    """Return the squared residual of each sequence, [B]; `advantage` is r - V*. Its mean is the loss of A*PO."""
    return residual(logprob, reference_logprob, advantage, beta2).square()


def importance_weight(logprob_train: torch.Tensor, logprob_rollout: torch.Tensor, cap: float) -> torch.Tensor:
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
