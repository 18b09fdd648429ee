"""The clipped policy gradient that GRPO, PPO and SPO share (PPO, arXiv 1707.06347, equation 7), token by token.

    loss_t = - min( rho_t A_t, clip(rho_t, 1 - low, 1 + high) A_t ) + kl_coef ( e^d_t - d_t - 1 )

rho_t = pi / pi_old and d_t = ln pi_ref - ln pi of a response token. For tokens that pi drew the last term estimates
KL(pi || pi_ref) without bias, and is never below 0 (k3 of GRPO, arXiv 2402.03300, equation 4); its gradient is that of
KL(pi_ref || pi), and for older tokens both are approximations. A_t is the method's. The loss of a
response is the sum over its tokens times a weight, by which the losses' mean is the mean that is asked for.

Legend: B sequences of a step, b of them, r of their response tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from astar_megatron.algorithm.objective import Columns, Need, ResponseTokens
from astar_megatron.config import Clipped
from astar_megatron.types import Rollout


def clipped_loss(cfg: Clipped, *, old_from_engine: bool = False) -> "ClippedLoss":
    """Return the loss with the clips and the KL of its keys."""
    return ClippedLoss(
        clip_low=cfg.clip_low, clip_high=cfg.clip_high, kl_coef=cfg.kl_coef, old_from_engine=old_from_engine
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ClippedLoss:
    """See objective.Loss. Columns: `advantage` [b] or `token_advantage` [r], and `token_weight` [b].

    pi_old is the policy before the step. With `old_from_engine` it is the one that drew the response, by the engine's
    log-probs in `engine_logprob` [r]: the ratio then holds for rollouts of older weights too.
    """

    clip_low: float
    clip_high: float
    kl_coef: float
    old_from_engine: bool = False
    gradient_scale: float = 1.0

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset() if self.old_from_engine else frozenset({"old"})

    def __call__(self, tokens: ResponseTokens, columns: Mapping[str, Tensor]) -> Tensor:
        per_token = "token_advantage" in columns
        advantage = columns["token_advantage"] if per_token else tokens.spread(columns["advantage"])  # [r]
        old = columns["engine_logprob"] if self.old_from_engine else tokens.old_logprobs
        ratio = (tokens.logprobs - old.float()).exp()
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        losses = -torch.minimum(ratio * advantage.float(), clipped * advantage.float())
        if self.kl_coef:
            behind = tokens.reference_logprobs - tokens.logprobs
            losses = losses + self.kl_coef * (behind.exp() - behind - 1)
        return tokens.total(losses) * columns["token_weight"].float()


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenMean:
    """Which mean the loss is over the tokens of a mini-batch; config_methods.Clipped.loss explains the three."""

    over: Literal["token", "sequence", "constant"]
    mini_batch_size: int
    max_response_tokens: int

    def columns(self, rollouts: Sequence[Rollout], **of_sequences: Tensor) -> Columns:
        """Return what ClippedLoss reads of a batch, beside `of_sequences` [B]."""
        logprobs = [logprob for rollout in rollouts for logprob in rollout.token_logprobs]
        return Columns(
            sequences={**of_sequences, "token_weight": self.weights(rollouts)},
            tokens={"engine_logprob": torch.tensor(logprobs, dtype=torch.float64)},
        )

    def weights(self, rollouts: Sequence[Rollout]) -> Tensor:
        """Return [B] float64, what the sum over a response's tokens is multiplied with."""
        lengths = torch.tensor([max(1, len(rollout.token_ids)) for rollout in rollouts], dtype=torch.float64)
        if self.over == "sequence":
            return 1 / lengths
        if self.over == "constant":
            return torch.full_like(lengths, 1 / self.max_response_tokens)
        totals = lengths.view(-1, self.mini_batch_size).sum(dim=1)  # a mini-batch is a run of the batch
        return (self.mini_batch_size / totals).repeat_interleave(self.mini_batch_size)
