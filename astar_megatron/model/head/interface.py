"""What every implementation of the head takes and gives.

Shapes: R response positions of a pack, B its sequences, H hidden, V vocabulary columns of this rank (padding included).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

# The losses [b] of some sequences of a pack: `loss(sequences, logprobs)` gets which ones, as a slice of the pack's, and
# the log-probs [r] of their response tokens (nats), by which it is differentiated. Called once for every sequence.
SequenceLoss = Callable[[slice, Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """What the columns of this rank's output weight mean, and the sampling temperature that divides the logits."""

    size: int  # real tokens; columns beyond are padding and get no probability
    temperature: float = 1.0
    first_column: int = 0  # of this rank
    group: ProcessGroup | None = None  # the ranks that hold the other columns, if any

    def real_columns(self, weight: Tensor) -> int:
        """How many of the [V, H] weight's rows are tokens; 0 on a rank that holds nothing but padding."""
        return max(0, min(weight.size(0), self.size - self.first_column))


@dataclass(frozen=True, slots=True, kw_only=True)
class Responses:
    """The target tokens [R] of a pack, sequence after sequence, and how many each of its B sequences has.

    Where ranks share the tokens of a sequence these are the rank's own, and `most` is how many the sequence has on
    whichever rank has most: all must take the same sequences at a time, for each loss is summed over them.
    """

    targets: Tensor
    lengths: tuple[int, ...]
    most: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        assert sum(self.lengths) == len(self.targets), (self.lengths, self.targets.shape)


class Head(Protocol):
    """Hidden states [R, H] and output weight [V, H], both float32 or both bfloat16, to log-probs in nats, float32.

    All methods are collective over `vocabulary.group`, and every rank of it gets the same result; hidden states are
    the same on all of them, and so is their gradient.
    """

    def token_logprobs(self, hidden: Tensor, weight: Tensor, responses: Responses, vocabulary: Vocabulary) -> Tensor:
        """Return the log-probs [R] of the targets, without a gradient."""
        ...

    def sequence_loss(
        self, hidden: Tensor, weight: Tensor, responses: Responses, vocabulary: Vocabulary, loss: SequenceLoss
    ) -> Tensor:
        """Return the sum of the sequences' losses, a differentiable scalar."""
        ...


def sequence_sums(values: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Return [B], the sum of each sequence's part of the values [R], differentiable; 0 for an empty response.

    Each sequence alone and in float64: the sum is the same whatever lies beside it in the pack, on every device.
    """
    return _SequenceSums.apply(values, lengths)  # type: ignore[return-value]


class _SequenceSums(torch.autograd.Function):
    """Autograd's own backward pass would take several small operations a sequence."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, lengths: tuple[int, ...]) -> Tensor:
        ctx.lengths = lengths
        return torch.stack([part.double().sum() for part in values.split(lengths)]).float()

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        lengths = torch.tensor(ctx.lengths, device=slopes[0].device)
        return slopes[0].repeat_interleave(lengths, output_size=sum(ctx.lengths)), None


def check(hidden: Tensor, weight: Tensor, responses: Responses, vocabulary: Vocabulary) -> None:
    """Raise ValueError where the inputs don't belong together."""
    rows = (len(responses.targets), weight.size(-1))
    if hidden.shape != rows or hidden.dtype != weight.dtype:
        raise ValueError(
            f"head: expected hidden states {rows} of {weight.dtype}, one row a target and the weight's width and type, "
            f"got {tuple(hidden.shape)} of {hidden.dtype}"
        )
    if not vocabulary.temperature > 0:
        raise ValueError(f"head: expected a temperature above 0, got {vocabulary.temperature}")
