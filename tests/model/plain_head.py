"""The head written down: all logits at once, the gradient by autograd. What the other two are checked against."""

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from astar_megatron.model.head.interface import Responses, SequenceLoss, Vocabulary, check
from astar_megatron.model.head.ranks import reduced, shared, summed


class PlainHead:
    """See interface.Head. Holds [R, V] logits several times over; takes float64 too."""

    def token_logprobs(self, hidden: Tensor, weight: Tensor, responses: Responses, vocabulary: Vocabulary) -> Tensor:
        logits, normaliser = _logits(hidden, weight, responses, vocabulary)
        columns = responses.targets - vocabulary.first_column  # [R]
        here = (columns >= 0) & (columns < logits.size(1))
        target_logits = logits.gather(1, columns.clamp(0, logits.size(1) - 1).unsqueeze(1)).squeeze(1)
        return summed(torch.where(here, target_logits, 0.0), vocabulary.group) - normaliser

    def sequence_loss(
        self, hidden: Tensor, weight: Tensor, responses: Responses, vocabulary: Vocabulary, loss: SequenceLoss
    ) -> Tensor:
        logprobs = self.token_logprobs(hidden, weight, responses, vocabulary)
        return loss(slice(0, len(responses.lengths)), logprobs).sum()


def _logits(hidden: Tensor, weight: Tensor, responses: Responses, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
    """Return the logits [R, V] in float32 or float64, minus infinity for padding, and their normaliser [R]."""
    check(hidden, weight, responses, vocabulary)
    logits = shared(hidden, vocabulary.group) @ weight.t()
    logits = (logits.double() if logits.dtype == torch.float64 else logits.float()) / vocabulary.temperature
    if vocabulary.real_columns(weight) < weight.size(0):
        padding = torch.arange(weight.size(0), device=logits.device) >= vocabulary.real_columns(weight)
        logits = logits.masked_fill(padding, -torch.inf)
    maximum = reduced(logits.detach().amax(1), vocabulary.group, ReduceOp.MAX)  # [R]
    total = summed((logits - maximum.unsqueeze(1)).exp().sum(1), vocabulary.group)
    return logits, maximum + total.log()
