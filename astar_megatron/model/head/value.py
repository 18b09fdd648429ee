"""The head of a critic: a value of each response token's position, from the same hidden states as its log-prob."""

from torch import Tensor

from astar_megatron.model.head.interface import Responses, SequenceLoss, Vocabulary


class ValueHead:
    """See interface.Head, with values (reward) in place of log-probs. The output weight and vocabulary are not used.

    `weight` [H] is the critic's own parameter; every tensor-parallel rank has all of it and computes the same.
    """

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    def token_logprobs(self, hidden: Tensor, weight: Tensor, responses: Responses, vocabulary: Vocabulary) -> Tensor:
        """Return the values [R]."""
        return hidden.float() @ self._weight.float()

    def sequence_loss(
        self, hidden: Tensor, weight: Tensor, responses: Responses, vocabulary: Vocabulary, loss: SequenceLoss
    ) -> Tensor:
        """Return the sum of the sequences' losses, a differentiable scalar."""
        values = self.token_logprobs(hidden, weight, responses, vocabulary)
        return loss(slice(0, len(responses.lengths)), values).sum()
