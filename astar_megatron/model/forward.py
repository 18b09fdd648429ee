"""Runs packs through a Megatron model with its own schedule: scoring without gradients, and the loss with them.

The loss is computed by the model's head (head/), which forms its gradient sequence by sequence. The schedule divides
it by the number of micro-batches IN PLACE (and multiplies it by the context-parallel ranks), DistributedDataParallel
averages gradients over all replicas; `run_loss` undoes both, so a caller writes the plain losses of its sequences.

Context-parallel ranks each compute the log-probs of the responses they hold. What a loss sums over a sequence's tokens
is summed over these ranks too (`HeldTokens.total`), with the loss's slope for each rank's own part of the sum.

Shapes: t stream positions of this rank (split.py), R response positions of a pack, r of this rank, B sequences of one
pack, b of them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
from astar_megatron.model.backend import FP8_TOKENS, Backend
from astar_megatron.model.head import output
from astar_megatron.model.head.interface import Head, Responses, SequenceLoss, Vocabulary, sequence_sums
from astar_megatron.model.head.ranks import summed
from astar_megatron.model.split import RankStream, rank_stream


def run_scoring(
    modules: Sequence[Any],
    packs: Sequence[PackedBatch],
    *,
    vocab_size: int,
    temperature: float,
    backend: Backend,
    head: Head | None = None,
) -> list[Tensor]:
    """Return the [R] log-probs (nats) of each pack's response tokens on ranks of the last stage, else nothing.

    `modules` are this rank's chunks of the model; with `head` in place of the device's they are what that one gives.
    Collective over tensor, pipeline and context ranks.
    """
    scored = []
    for stream, logprobs in _scored(modules, packs, _Inputs(vocab_size, temperature, backend, head)):
        # [R], zero where another rank has the response token: the sum over ranks fills in
        everywhere = logprobs.new_zeros(stream.num_responses).index_copy(0, stream.rows.to(logprobs.device), logprobs)
        scored.append(_over_context(everywhere))
    return scored


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnScores:
    """The log-probs [r] (nats) of the response tokens of a pack that this rank of the last stage holds."""

    logprobs: Tensor
    lengths: tuple[int, ...]  # response tokens of each of its sequences here

    @property
    def sums(self) -> Tensor:
        """[B] of whole responses; collective over the ranks that share them."""
        return _over_context(sequence_sums(self.logprobs, self.lengths))


def run_own_scoring(
    modules: Sequence[Any], packs: Sequence[PackedBatch], *, vocab_size: int, temperature: float, backend: Backend
) -> list[OwnScores]:
    """Return each pack's scores on ranks of the last stage, else nothing.

    They are bitwise what `run_loss` gives `loss` under the same weights. Collective as `run_scoring`.
    """
    scored = _scored(modules, packs, _Inputs(vocab_size, temperature, backend))
    return [OwnScores(logprobs=logprobs, lengths=stream.response_lengths) for stream, logprobs in scored]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldTokens:
    """Which response tokens of a pack some of its sequences have on this rank."""

    sequences: slice  # of the pack's
    lengths: tuple[int, ...]  # response tokens of each of them here
    own: slice  # where they lie among this rank's response tokens of the pack
    rows: Tensor  # [r] where they lie among all response tokens of the pack

    def total(self, values: Tensor) -> Tensor:
        """Return the sums [b] of `values` [r] over each sequence's tokens, on all ranks that share them; collective.

        Each rank gets the gradient of the sum.
        """
        return _over_context(sequence_sums(values, self.lengths))


def run_loss(
    modules: Sequence[Any],
    packs: Sequence[PackedBatch],
    loss: Callable[[int, HeldTokens, Tensor], Tensor],
    *,
    vocab_size: int,
    temperature: float,
    backend: Backend,
    head: Head | None = None,
) -> None:
    """Accumulate the gradient of the sum of all sequences' losses over the packs of ALL data-parallel ranks.

    `loss(i, held_tokens, logprobs)` returns the losses [b] of some sequences of pack i from the log-probs [r] (nats) of
    the response tokens that this rank holds of them, or what `head` gives in their place. It is called on the last
    stage, once for each sequence. Collective over tensor, pipeline and context ranks.
    """
    scale = len(packs) * parallel_state.get_data_parallel_world_size()

    def scaled(total: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return total * scale, {}

    inputs = _Inputs(vocab_size, temperature, backend, head)
    streams = inputs.streams(modules, packs)

    def pack_loss(index: int, sequences: slice, logprobs: Tensor) -> Tensor:
        return loss(index, _held_tokens(streams[index], sequences), logprobs)

    _schedule(modules, streams, partial(_forward_step, inputs, pack_loss, scaled), forward_only=False)


def _held_tokens(stream: RankStream, sequences: slice) -> HeldTokens:
    first = sum(stream.response_lengths[: sequences.start])  # response tokens of the sequences before
    lengths = stream.response_lengths[sequences]
    own = slice(first, first + sum(lengths))
    return HeldTokens(sequences=sequences, lengths=lengths, own=own, rows=stream.rows[own])


def _scored(
    modules: Sequence[Any], packs: Sequence[PackedBatch], inputs: "_Inputs"
) -> Iterator[tuple[RankStream, Tensor]]:
    """Yield on ranks of the last stage each pack as split, and the [r] log-probs of the responses that lie here."""
    collected: list[Tensor] = []

    def collect(logprobs: Tensor, non_loss_data: bool = False) -> Tensor:
        collected.append(logprobs)
        return logprobs

    streams = inputs.streams(modules, packs)
    with torch.no_grad():
        _schedule(modules, streams, partial(_forward_step, inputs, None, collect), forward_only=True)
    return zip(streams, collected, strict=False)


def _over_context(tensor: Tensor) -> Tensor:
    """Return the sum over the context-parallel ranks, each of which gets the gradient of the sum."""
    return summed(tensor, parallel_state.get_context_parallel_group())  # type: ignore[arg-type]


class _Inputs:
    """What every forward pass of a run has in common."""

    def __init__(self, vocab_size: int, temperature: float, backend: Backend, head: Head | None = None) -> None:
        self.vocab_size, self.temperature, self.backend = vocab_size, temperature, backend
        self.head = head or output.choose(backend)

    def streams(self, modules: Sequence[Any], packs: Sequence[PackedBatch]) -> list[RankStream]:
        """Return this rank's part of each pack."""
        axes = {
            "align": FP8_TOKENS if get_model_config(modules[0]).fp8 else 1,
            "tensor": parallel_state.get_tensor_model_parallel_world_size(),
            "context": parallel_state.get_context_parallel_world_size(),
            "rank": parallel_state.get_context_parallel_rank(),
        }
        return [rank_stream(packed, **axes) for packed in packs]

    def model_arguments(self, stream: RankStream, padded_vocab: int, loss: SequenceLoss | None) -> dict[str, Any]:
        device = self.backend.device
        columns = padded_vocab // parallel_state.get_tensor_model_parallel_world_size()  # of this rank
        vocabulary = Vocabulary(
            size=self.vocab_size,
            temperature=self.temperature,
            first_column=columns * parallel_state.get_tensor_model_parallel_rank(),
            group=parallel_state.get_tensor_model_parallel_group(),  # type: ignore[arg-type]
        )
        return {
            "input_ids": stream.token_ids[None].to(device),  # [1, t]
            "position_ids": stream.position_ids[None].to(device),  # [1, t]
            "attention_mask": None,
            "packed_seq_params": _packed_sequences(stream, self.backend),
            "output_processor": output.head_output,
            "output_processor_context": output.HeadInputs(
                head=self.head,
                positions=stream.positions.to(device),
                responses=Responses(
                    targets=stream.targets.to(device), lengths=stream.response_lengths, most=stream.most_responses
                ),
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
    index, stream = next(iterator)
    padded_vocab = _innermost(module).vocab_size
    pack_loss = None if loss is None else partial(loss, index)
    return module(**inputs.model_arguments(stream, padded_vocab, pack_loss)), finish


def _schedule(modules: Sequence[Any], streams: Sequence[RankStream], forward_step: Any, *, forward_only: bool) -> None:
    iterators: list[Any] = [iter(enumerate(streams)) for _ in modules]
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(modules) > 1 else iterators[0],
        model=list(modules) if len(modules) > 1 else modules[0],
        num_microbatches=len(streams),
        seq_length=1,  # unused: get_model_config(module).variable_seq_lengths
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )
    assert get_model_config(modules[0]).variable_seq_lengths


def _packed_sequences(stream: RankStream, backend: Backend) -> PackedSeqParams:
    device = backend.device
    if not backend.uses_transformer_engine:
        return PackedSequences(
            position_ids=stream.position_ids.to(device),
            prefix_tokens=stream.prefix_tokens,
            lengths=stream.lengths,
            order=None if stream.order is None else stream.order.to(device),
        )
    if stream.prefix_tokens:
        raise AssertionError("Transformer Engine's attention takes packs without a shared prefix")
    # Of the whole sequences: its attention and megatron's rotary embedding know which pieces of each a rank of the
    # context axis holds. Padding counts as tokens, so nothing lies between two sequences.
    bounds = torch.tensor([0, *stream.lengths], dtype=torch.int32, device=device).cumsum(
        0, dtype=torch.int32
    )  # [B + 1]
    longest = max(stream.lengths)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        cu_seqlens_q_padded=bounds,
        cu_seqlens_kv_padded=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        pad_between_seqs=False,
    )


def _innermost(module: Any) -> Any:
    while hasattr(module, "module"):
        module = module.module
    return module
