"""Log-probs of the response tokens from the last hidden states; the one place where logits exist.

Only positions that predict a response token reach the LM head. The vocabulary may be split over tensor-parallel
ranks and padded; rows of logits are made in slices within a byte budget and made again in the backward pass when
there is more than one. Leaves out the fused kernels, which never make logits.

Shapes: T packed tokens, R response positions, H hidden, V vocabulary columns of this rank.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LOGITS_BYTES = 1 << 30  # of one slice, in float32


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadInputs:
    """What the head needs beside hidden states: positions [R] in the stream, target token ids [R], temperature."""

    positions: Tensor
    targets: Tensor
    temperature: float
    vocab_size: int  # real tokens; columns beyond are padding and get no probability
    first_column: int  # of this tensor-parallel rank


def response_logprobs(
    *, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, context: HeadInputs, **_: Any
) -> Tensor:
    """Return [R] float32 log-probs (nats) of the targets; every tensor-parallel rank holds all of them.

    `hidden_states` is [T, 1, H]. Signature of GPTModel's `output_processor`.
    """
    hidden = hidden_states.squeeze(1)[context.positions]  # [R, H]
    if not len(hidden):
        return hidden.float().sum(dim=-1)
    columns = (output_layer.weight if output_weight is None else output_weight).size(0)
    rows = max(1, LOGITS_BYTES // (4 * columns))

    def slice_logprobs(rows_hidden: Tensor, targets: Tensor) -> Tensor:
        logits, _ = output_layer(rows_hidden.unsqueeze(1), weight=output_weight)  # [r, 1, V]
        return _token_logprobs(logits.float(), targets, context)

    if len(hidden) <= rows:
        return slice_logprobs(hidden, context.targets)
    parts = [
        checkpoint(slice_logprobs, part, targets, use_reentrant=False)
        for part, targets in zip(hidden.split(rows), context.targets.split(rows), strict=True)
    ]
    return torch.cat(parts)  # pyright: ignore[reportArgumentType, reportCallIssue]


def _token_logprobs(logits: Tensor, targets: Tensor, context: HeadInputs) -> Tensor:
    if context.temperature != 1.0:
        logits = logits / context.temperature
    real = context.vocab_size - context.first_column
    if real < logits.size(-1):
        padding = torch.arange(logits.size(-1), device=logits.device) >= real
        logits = logits.masked_fill(padding, torch.finfo(logits.dtype).min)
    return -vocab_parallel_cross_entropy(logits, targets.unsqueeze(1)).squeeze(1)
