"""Which sequences of a batch a rank takes, in which packs. Each rank derives the same from the same batch.

Shapes: B sequences of a step, b of a pack, r response tokens of them.
"""

from collections.abc import Iterator, Sequence

import torch
from megatron.core import parallel_state
from torch import Tensor

from astar_megatron.algorithm import packing
from astar_megatron.algorithm.packing import PackedBatch, balanced, pack
from astar_megatron.model.backend import Backend
from astar_megatron.model.forward import HeldTokens
from astar_megatron.types import RolloutBatch, StepOptions
from conversion.tiles import ParallelLayout

type Group = Sequence[tuple[list[int], PackedBatch]]  # this rank's packs of a mini-batch, and their batch indices


def mini_batches(batch: RolloutBatch, options: StepOptions) -> list[list[int]]:
    """Return the batch indices of each mini-batch. Raises ValueError where they are not equally large."""
    size = options.mini_batch_size
    if len(batch) % size:
        raise ValueError(f"a batch of {len(batch)} sequences is no multiple of the mini-batch, {size}")
    return [list(range(start, start + size)) for start in range(0, len(batch), size)]


def micro_batches(
    batch: RolloutBatch, indices: list[int], options: StepOptions, layout: ParallelLayout, backend: Backend
) -> Iterator[tuple[list[int], PackedBatch]]:
    """Yield this rank's packs of a mini-batch with the batch indices of their sequences."""
    lengths = [len(batch.token_ids[i]) for i in indices]
    parts = split_evenly(lengths, layout.data)
    own = [[lengths[i] for i in part] for part in parts]
    together = layout.pipeline if layout.virtual > 1 else 1  # interleaved stages take so many at a time
    rank = parallel_state.get_data_parallel_rank()
    for micro in equally_many_micro_batches(own, options.micro_batch_tokens, together)[rank]:
        chosen = [indices[parts[rank][i]] for i in micro]
        token_ids, prompts = [batch.token_ids[i] for i in chosen], [batch.prompt_tokens[i] for i in chosen]
        yield chosen, packed_for(token_ids, prompts, layout, backend)


def packed_for(
    token_ids: Sequence[Sequence[int]], prompt_tokens: Sequence[int], layout: ParallelLayout, backend: Backend
) -> PackedBatch:
    """Return the sequences in one pack, as the device's attention takes it."""
    return pack(token_ids, prompt_tokens, share_prefix=backend.shares_prefix and layout.context == 1)


def split_evenly(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Return the indices of the sequences of each of `parts` ranks: the same number each, balanced by tokens.

    Deterministic; indices ascend within a part. Raises ValueError where `parts` does not divide their number.
    """
    if parts < 1 or len(lengths) % parts:
        raise ValueError(
            f"split_evenly: {len(lengths)} sequences can't be shared evenly by {parts} ranks; "
            "make the mini-batch a multiple of parallel.data"
        )
    return balanced(lengths, parts, capacity=len(lengths) // parts)


def equally_many_micro_batches(
    lengths: Sequence[Sequence[int]], max_tokens: int, multiple_of: int = 1
) -> list[list[list[int]]]:
    """Return `packing.micro_batches` of each rank, equally many: ranks that share experts meet in each of them.

    `lengths` are those of each rank's sequences, of which all have the same number. Raises ValueError.
    """
    number = 1
    while True:  # ends: with a sequence a micro-batch all have the same number
        batches = [packing.micro_batches(own, max_tokens, multiple_of, at_least=number) for own in lengths]
        if len({len(rank) for rank in batches}) == 1:
            return batches
        number = max(len(rank) for rank in batches)


class GroupColumns:
    """The columns of a mini-batch on the device, as its losses read them."""

    def __init__(self, batch: RolloutBatch, group: Group, device: torch.device) -> None:
        self._group, self._device = group, device
        lengths = batch.response_lengths().tolist()
        places = torch.arange(sum(lengths)).split(lengths)
        self._places = [torch.cat([places[i] for i in indices]) for indices, _ in group]
        self._of_sequences = {name: column.to(device) for name, column in batch.columns.items()}
        of_tokens = {name: column.split(lengths) for name, column in batch.token_columns.items()}
        self._of_packs = [
            {name: torch.cat([parts[i] for i in indices]).to(device) for name, parts in of_tokens.items()}
            for indices, _ in group
        ]

    def add(self, name: str, column: Tensor) -> None:
        """Add a column of all sequences of the batch."""
        self._of_sequences[name] = column

    def __getitem__(self, name: str) -> Tensor:
        return self._of_sequences[name]

    def places(self, index: int, held_tokens: HeldTokens) -> Tensor:
        """Return [r], where tokens of pack `index` lie among the response tokens of the batch."""
        return self._places[index][held_tokens.rows].to(self._device)

    def seen_by_loss(self, index: int, held_tokens: HeldTokens) -> tuple[list[int], dict[str, Tensor]]:
        """Return of some sequences of pack `index` the batch indices, and the columns of them and of their tokens."""
        indices = self._group[index][0][held_tokens.sequences]
        rows = held_tokens.rows.to(self._device)
        of_tokens = {name: column[rows] for name, column in self._of_packs[index].items()}
        return indices, {name: column[indices] for name, column in self._of_sequences.items()} | of_tokens
