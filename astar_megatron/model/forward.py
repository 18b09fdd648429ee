"""Runs packs through a Megatron model with its own schedule: scoring without gradients, and the loss with them.

The loss is computed by the model's head (head/), which forms its gradient sequence by sequence. The schedule divides
it by the number of micro-batches IN PLACE, and DistributedDataParallel averages gradients over data-parallel ranks;
`run_loss` undoes both, so a caller writes the plain losses of its sequences.

Shapes: T stream positions, R response positions, B sequences of one pack, b of them.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from torch import Tensor

from astar_megatron.algorithm.packing import PackedBatch
from astar_megatron.model.attention import PackedSequences
from astar_megatron.model.backend import Backend
from astar_megatron.model.head import output
from astar_megatron.model.head.interface import Responses, SequenceLoss, Vocabulary


def run_scoring(
    module: Any, packs: Sequence[PackedBatch], *, vocab_size: int, temperature: float, backend: Backend
) -> list[Tensor]:
    """Return the [R] log-probs (nats) of each pack's response tokens on ranks of the last stage, else nothing.

    Collective over tensor and pipeline ranks.
    """
    collected: list[Tensor] = []

    def collect(logprobs: Tensor, non_loss_data: bool = False) -> Tensor:
        collected.append(logprobs)
        return logprobs

    inputs = _Inputs(vocab_size, temperature, backend)
    with torch.no_grad():
        _schedule(module, packs, partial(_forward_step, inputs, None, collect), forward_only=True)
    return collected


def run_loss(
    module: Any,
    packs: Sequence[PackedBatch],
    loss: Callable[[int, slice, Tensor], Tensor],
    *,
    vocab_size: int,
    temperature: float,
    backend: Backend,
) -> None:
    """Accumulate the gradient of the sum of all sequences' losses over the packs of ALL data-parallel ranks.

    `loss(i, sequences, sums)` returns the losses [b] of the slice `sequences` of pack i from the sums [b] of their
    log-probs (nats). It is called on the last stage, once for each sequence. Collective over tensor and pipeline ranks.
    """
    scale = len(packs) * parallel_state.get_data_parallel_world_size(with_context_parallel=True)

    def scaled(total: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return total * scale, {}

    inputs = _Inputs(vocab_size, temperature, backend)
    _schedule(module, packs, partial(_forward_step, inputs, loss, scaled), forward_only=False)


class _Inputs:
    """What every forward pass of a run has in common."""

    def __init__(self, vocab_size: int, temperature: float, backend: Backend) -> None:
        self.vocab_size, self.temperature, self.backend = vocab_size, temperature, backend
        self.head = output.choose(backend)

    def model_arguments(self, packed: PackedBatch, padded_vocab: int, loss: SequenceLoss | None) -> dict[str, Any]:
        device = self.backend.device
        columns = padded_vocab // parallel_state.get_tensor_model_parallel_world_size()
        vocabulary = Vocabulary(
            size=self.vocab_size,
            temperature=self.temperature,
            first_column=columns * parallel_state.get_tensor_model_parallel_rank(),
            group=parallel_state.get_tensor_model_parallel_group(),  # type: ignore[arg-type]
        )
        return {
            "input_ids": packed.token_ids[None].to(device),
            "position_ids": packed.position_ids[None].to(device),
            "attention_mask": None,
            "packed_seq_params": _packed_sequences(packed, self.backend),
            "output_processor": output.head_output,
            "output_processor_context": output.HeadInputs(
                head=self.head,
                positions=packed.target_positions.to(device),
                responses=Responses(targets=packed.targets.to(device), lengths=packed.response_lengths),
                vocabulary=vocabulary,
                loss=loss,
            ),
        }


def _forward_step(
    inputs: _Inputs,
    loss: Callable[[int, slice, Tensor], Tensor] | None,
    finish: Callable[..., Any],
    iterator: Any,
    module: Any,
    *_: Any,
) -> tuple[Tensor, Any]:
    index, packed = next(iterator)
    padded_vocab = _innermost(module).vocab_size
    pack_loss = None if loss is None else partial(loss, index)
    return module(**inputs.model_arguments(packed, padded_vocab, pack_loss)), finish


def _schedule(module: Any, packs: Sequence[PackedBatch], forward_step: Any, *, forward_only: bool) -> None:
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(enumerate(packs)),
        model=module,
        num_microbatches=len(packs),
        seq_length=1,  # unused: get_model_config(module).variable_seq_lengths
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )
    assert get_model_config(module).variable_seq_lengths


def _packed_sequences(packed: PackedBatch, backend: Backend) -> PackedSeqParams:
    device = backend.device
    if not backend.uses_transformer_engine:
        return PackedSequences(
            position_ids=packed.position_ids.to(device), prefix_tokens=packed.prefix_tokens, lengths=packed.lengths
        )
    if packed.prefix_tokens:
        raise AssertionError("Transformer Engine's attention takes packs without a shared prefix")
    bounds = torch.tensor([0, *packed.lengths], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
    longest = max(packed.lengths)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        cu_seqlens_q_padded=bounds,
        cu_seqlens_kv_padded=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def _innermost(module: Any) -> Any:
    while hasattr(module, "module"):
        module = module.module
    return module
