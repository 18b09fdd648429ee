"""The head as GPTModel's `output_processor`: takes the response positions of the last hidden states to a Head.

Shapes of this rank: T packed tokens, R response positions, H hidden, V vocabulary columns.
"""

import importlib
from dataclasses import dataclass
from typing import Any

from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from astar_megatron.model.backend import Backend
from astar_megatron.model.head.chunked import TorchKernels
from astar_megatron.model.head.fused import FusedHead
from astar_megatron.model.head.interface import Head, Responses, SequenceLoss, Vocabulary

# Named, not imported: Triton is not on every machine.
_TRITON_KERNELS = ("astar_megatron.model.head.triton_kernels", "TritonKernels")


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadInputs:
    """What one pass needs beside hidden states: positions [R] in the stream and what is wanted of them.

    Without `loss` the model's output is the log-probs [R] of the targets, with it the sum of the sequences' losses.
    """

    head: Head
    positions: Tensor
    responses: Responses
    vocabulary: Vocabulary
    loss: SequenceLoss | None = None


def choose(backend: Backend) -> Head:
    """Return the head for this device."""
    if not backend.has_triton:
        return FusedHead(TorchKernels())
    module, name = _TRITON_KERNELS
    return FusedHead(getattr(importlib.import_module(module), name)())


def head_output(
    *, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, context: HeadInputs, **_: Any
) -> Tensor:
    """Return what `context` asks for; every tensor-parallel rank holds all of it. `hidden_states` is [T, 1, H], or
    this rank's equal part of it where the model is sequence parallel.
    """
    if output_layer.sequence_parallel:  # the head sums the gradient of hidden states over the ranks itself
        hidden_states = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=False)
    hidden = hidden_states.squeeze(1)[context.positions]
    for hook in output_layer._forward_pre_hooks.values():  # as if it were called: they wait for weights under way
        hook(output_layer, ())
    weight = output_layer.weight if output_weight is None else output_weight
    if context.loss is None:
        return context.head.token_logprobs(hidden, weight, context.responses, context.vocabulary)
    return context.head.sequence_loss(hidden, weight, context.responses, context.vocabulary, context.loss)
