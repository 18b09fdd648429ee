"""A tabular softmax policy, on which everything that a method promises can be computed: one response is one token."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from astar_megatron.algorithm.objective import ResponseTokens


def table(seed: int, prompts: int = 5, responses: int = 7) -> tuple[Tensor, Tensor]:
    """Log-probs of a reference and rewards from 0 to 1, both [prompts, responses] at random."""
    random = torch.Generator().manual_seed(seed)
    reference = torch.randn(prompts, responses, generator=random, dtype=torch.float64).log_softmax(-1)
    return reference, torch.rand(prompts, responses, generator=random, dtype=torch.float64)


def optimum(reference: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """ln of pi_ref e^(r / beta) / Z, which maximises E[r] - beta KL(pi || pi_ref)."""
    return (reference + rewards / beta).log_softmax(-1)


def kl(policy: Tensor, other: Tensor) -> float:
    """KL(policy || other) of log-probs [prompts, responses], nats, the mean over prompts."""
    return float((policy.exp() * (policy - other)).sum(-1).mean())


def losses_of(
    loss: Any, logprobs: Tensor, columns: Mapping[str, Tensor], *, reference: Tensor | None = None, old: Any = None
) -> Tensor:
    """The losses [n] of n responses of one token each; by default reference and old policy are the policy itself."""
    tokens = ResponseTokens(
        logprobs=logprobs,
        reference_logprobs=logprobs.detach() if reference is None else reference,
        lengths=(1,) * len(logprobs),
        sum_tokens=lambda values: values,
        before=logprobs.detach() if old is None else old,
    )
    return loss(tokens, columns)


def reward_gradient(logits: Tensor, rewards: Tensor) -> Tensor:
    """The gradient of E_pi[r], the mean over prompts, by `logits` [prompts, responses]."""
    expected = (logits.softmax(-1) * rewards).sum(-1).mean()
    return torch.autograd.grad(expected, logits)[0]
