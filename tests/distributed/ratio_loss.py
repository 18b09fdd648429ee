"""A loss of another kind than A*PO's, of ratios of single tokens, to show that the ranks know no method."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from astar_megatron.algorithm.objective import ResponseTokens


@dataclass(frozen=True, slots=True)
class ClippedRatio:
    """Mean over a sequence's tokens of - min(ratio A, clip(ratio) A) and of the k3 estimate of KL to the reference."""

    clip: float = 0.2
    kl: float = 0.1
    gradient_scale: float = 3.0

    def __call__(self, tokens: ResponseTokens, columns: Mapping[str, Tensor]) -> Tensor:
        advantage = tokens.spread(columns["advantage"].float())  # [r]
        ratio = (tokens.logprobs - columns["old_logprob"].float()).exp()
        clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
        behind = tokens.reference_logprobs - tokens.logprobs
        per_token = self.kl * (behind.exp() - behind - 1) - torch.minimum(ratio * advantage, clipped * advantage)
        return tokens.total(per_token) / columns["response_tokens"].float()
