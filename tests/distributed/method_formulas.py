"""The methods' losses once more, as their papers have them, in float64 and without anything of the product's.

A batch here is a list of response: `now`, `old` and `ref` are its tokens' log-probs [r] under the policy, the policy
before the step and the reference; columns are the product's, a number of each response or a list of its tokens'.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from astar_megatron.algorithm.astar import AstarLoss
from astar_megatron.algorithm.clipped import ClippedLoss
from astar_megatron.algorithm.oapl import OaplLoss
from astar_megatron.algorithm.rebel import RebelLoss


@dataclass(frozen=True)
class Tokens:
    """Of one response."""

    now: Tensor
    old: Tensor
    ref: Tensor


type Formula = Callable[[Sequence[Tokens], dict[str, Any]], Tensor]  # losses of the responses


@dataclass(frozen=True)
class Method:
    """A loss of the product and the formula that it is held to. `of_pairs`: its mean is over pairs of responses."""

    loss: Any
    formula: Formula
    columns: tuple[str, ...]
    token_columns: tuple[str, ...] = field(default=())
    of_pairs: bool = False


def _astar(batch: Sequence[Tokens], columns: dict[str, Any]) -> Tensor:
    losses = []
    for tokens, reward, value, engine in zip(
        batch, columns["reward"], columns["v_star"], columns["rollout_logprob"], strict=True
    ):
        weight = min(1.5, float((tokens.now.detach().sum() - engine).exp()))
        losses.append(weight * (0.05 * (tokens.now.sum() - tokens.ref.sum()) - (reward - value)) ** 2)
    return torch.stack(losses)


def _oapl(batch: Sequence[Tokens], columns: dict[str, Any]) -> Tensor:
    pairs = zip(batch, columns["engine_logprob"], columns["advantage"], strict=True)
    return torch.stack([(0.05 * (tokens.now.sum() - engine) - advantage) ** 2 for tokens, engine, advantage in pairs])


def _oapl_of_the_copy(batch: Sequence[Tokens], columns: dict[str, Any]) -> Tensor:
    shifts = (tokens.now.sum() - tokens.ref.sum() for tokens in batch)
    return torch.stack([(0.05 * shift - gain) ** 2 for shift, gain in zip(shifts, columns["advantage"], strict=True)])


def _rebel(batch: Sequence[Tokens], columns: dict[str, Any]) -> Tensor:
    losses = []
    for i in range(0, len(batch), 2):
        first, second = (tokens.now.sum() - tokens.old.sum() for tokens in batch[i : i + 2])
        losses.append(((first - second) / 2.5 - (columns["reward"][i] - columns["reward"][i + 1])) ** 2)
    return torch.stack(losses).repeat_interleave(2)


def _surrogate(tokens: Tokens, advantage: Any, weight: Any, old: Tensor, kl_coef: float) -> Tensor:
    losses = []
    for t in range(len(tokens.now)):
        ratio, a = (tokens.now[t] - old[t]).exp(), advantage[t]
        below, above = float(ratio.detach()) < 0.95, float(ratio.detach()) > 1.08
        clipped = torch.tensor(0.95) if below else torch.tensor(1.08) if above else ratio
        kl = (tokens.ref[t] - tokens.now[t]).exp() - (tokens.ref[t] - tokens.now[t]) - 1
        losses.append(-min(ratio * a, clipped * a, key=lambda loss: float(loss.detach())) + kl_coef * kl)
    return weight * torch.stack(losses).sum()


def _grpo(batch: Sequence[Tokens], columns: dict[str, Any]) -> Tensor:
    rows = zip(batch, columns["advantage"], columns["token_weight"], strict=True)
    return torch.stack([_surrogate(each, [a] * len(each.now), w, each.old, 0.1) for each, a, w in rows])


def _of_the_policy(batch: Sequence[Tokens], columns: dict[str, Any]) -> Tensor:
    rows = zip(batch, columns["token_advantage"], columns["token_weight"], strict=True)
    return torch.stack([_surrogate(each, a, w, each.old, 0.1) for each, a, w in rows])


def _of_the_engine(batch: Sequence[Tokens], columns: dict[str, Any]) -> Tensor:
    rows = zip(batch, columns["token_advantage"], columns["token_weight"], columns["engine_logprob"], strict=True)
    return torch.stack([_surrogate(each, a, w, old, 0.0) for each, a, w, old in rows])


_CLIPS: dict[str, Any] = {"clip_low": 0.05, "clip_high": 0.08}
METHODS = {
    "astar": Method(AstarLoss(beta2=0.05, importance_cap=1.5), _astar, ("reward", "v_star", "rollout_logprob")),
    "oapl": Method(OaplLoss(beta2=0.05), _oapl, ("advantage", "engine_logprob")),
    "oapl of a copy": Method(OaplLoss(beta2=0.05, against_copy=True), _oapl_of_the_copy, ("advantage",)),
    "grpo": Method(ClippedLoss(**_CLIPS, kl_coef=0.1), _grpo, ("advantage", "token_weight")),
    "ppo": Method(ClippedLoss(**_CLIPS, kl_coef=0.1), _of_the_policy, ("token_weight",), ("token_advantage",)),
    "tokens": Method(
        ClippedLoss(**_CLIPS, kl_coef=0.0, old_from_engine=True),
        _of_the_engine,
        ("token_weight",),
        ("token_advantage", "engine_logprob"),
    ),
    "rebel": Method(RebelLoss(eta=2.5), _rebel, ("reward", "peer_reward", "peer"), of_pairs=True),
}
