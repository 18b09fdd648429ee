"""What a method of policy optimisation is to the rest of the system.

The program gives an `Objective` its scored rollouts: it turns them into columns, numbers of each sequence or of each
response token, and learns from them afterwards. Its `Loss` goes to the ranks with the batch, and is a pure function of
the tokens' log-probs and those columns. A method is one page: its equation, its columns, its loss, its health.

Legend: B sequences of a step, b of them, r of their response tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from astar_megatron.algorithm.metrics import LogprobSums
from astar_megatron.types import Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """What an objective says of a batch: by name a number of each sequence, or of each response token in order."""

    sequences: Mapping[str, Tensor]  # [B] each
    tokens: Mapping[str, Tensor] = field(default_factory=dict)  # [response tokens of all B] each


# What a loss reads beside log-probs of policy and reference. The first two cost a forward pass of what lies behind the
# first mini-batch of a step, whose weights are still those of its beginning; values one of the critic.
#   "old": `ResponseTokens.old_logprobs`
#   "peer_shift": the column of that name, how far the log-prob of the response that the column "peer" numbers has moved
#   "values": a critic's, of all tokens of the batch; the loss is a CriticLoss
type Need = Literal["old", "peer_shift", "values"]


@dataclass(frozen=True, kw_only=True)
class ResponseTokens:
    """The response tokens of b sequences, one sequence after the other, as a loss sees them.

    A machine may hold a part of them only. `total` and `spread` are then of the whole sequences all the same, so a loss
    that goes from tokens to sequences by `total` alone is right wherever it runs.
    """

    logprobs: Tensor  # [r] of the policy, nats; the loss is differentiated by these
    reference_logprobs: Tensor  # [r] of the reference, nats
    lengths: tuple[int, ...]  # how many of the r tokens each sequence has here
    sum_tokens: Callable[[Tensor], Tensor]  # see `total`
    before: Tensor | None = None  # see `old_logprobs`

    @property
    def old_logprobs(self) -> Tensor:
        """[r] of the policy before the step, nats. For losses that need "old"."""
        if self.before is None:
            raise AssertionError('old_logprobs: this loss does not have "old" among its needs')
        return self.before

    def total(self, values: Tensor) -> Tensor:
        """Return the sums [b] over each sequence's tokens of `values` [r], summed in float64; differentiable."""
        return self.sum_tokens(values)

    def spread(self, values: Tensor) -> Tensor:
        """Return [r], for each token the value of its sequence of `values` [b]."""
        lengths = torch.tensor(self.lengths, device=values.device)
        return values.repeat_interleave(lengths, output_size=sum(self.lengths))

    @cached_property
    def sums(self) -> Tensor:
        """ln pi of the responses [b], differentiable."""
        return self.total(self.logprobs)

    @cached_property
    def reference_sums(self) -> Tensor:
        """ln pi_ref of the responses [b]."""
        return self.total(self.reference_logprobs)


class Loss(Protocol):
    """The part of an objective that the ranks compute; picklable."""

    @property
    def gradient_scale(self) -> float:
        """What the gradient is multiplied with; losses are reported without."""
        ...

    @property
    def needs(self) -> frozenset[Need]: ...

    def __call__(self, tokens: ResponseTokens, columns: Mapping[str, Tensor]) -> Tensor:
        """Return the losses [b]; `columns` are those of these sequences [b] and of these tokens [r]."""
        ...


class CriticLoss(Loss, Protocol):
    """The loss of a method with a critic, which learns beside the policy."""

    @property
    def value(self) -> Loss:
        """The critic's own, of values in place of log-probs."""
        ...

    def with_values(self, rewards: Tensor, values: Tensor, lengths: Sequence[int]) -> dict[str, Tensor]:
        """Return columns of the [N] response tokens of a batch, for both losses, from the values before the step.

        `rewards` [B] is the column "reward", `lengths` are those of the B responses; all in float64.
        """
        ...


class Objective(Protocol):
    """A method, while a program trains with it. Methods derive from this class; those below `metrics` may stay as here.

    `columns` and `metrics` get the rollouts of a step in the order of their requests: the responses to a prompt, of
    which there are config.RunConfig.group_size, lie beside each other.
    """

    loss: Loss
    chooses_prompts: ClassVar[bool] = False  # by `priorities`; else all come equally often

    def columns(self, rollouts: Sequence[Rollout]) -> Columns:
        """Return what the loss needs of a batch; a rollout that could not be scored has its `score` all the same."""
        ...

    def metrics(
        self, rollouts: Sequence[Rollout], columns: Mapping[str, Tensor], sums: LogprobSums
    ) -> Mapping[str, float]:
        """Return a step's health from its columns of sequences and the log-probs that it found."""
        ...

    def learn(self, rollouts: Sequence[Rollout], health: Mapping[str, float]) -> None:
        """Take in rollouts whose step is done; `health` is what `metrics` said of it."""
        return

    def state(self) -> dict[str, Any]:
        """Return what was learnt, ready for JSON: entries of a checkpoint's progress, by name."""
        return {}

    def restore(self, progress: Mapping[str, Any]) -> None:
        """Continue where the progress was written. Raises ValueError where this run can't."""
        return

    def refreshes_reference(self, step: int) -> bool:
        """Say whether the reference becomes the policy as it is before `step`."""
        return False

    def priorities(self, uids: Sequence[str]) -> Sequence[float]:
        """Return how much there is to learn from each prompt now, above 0."""
        return [1.0] * len(uids)
