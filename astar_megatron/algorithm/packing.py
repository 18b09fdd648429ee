"""Which sequences share a forward pass, and how they lie in it.

A pack is one flat stream that predicts the next token; nothing is padded, so no padding id ever makes a mask:

    stream = [ prefix, P tokens | own part of sequence 0 | own part of sequence 1 | ... ]         (T tokens)

The prefix is what all sequences of the pack begin with, stored once; the own part of sequence b is the rest of it
without its last token, which predicts nothing. The prefix ends before the last prompt token, so that every position
that predicts a response token lies in an own part. A response is all tokens after the prompt, its EOS included.

Legend: B sequences, T stream positions, R response tokens, P prefix tokens.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """One forward pass. Position `target_positions[i]` predicts `targets[i]`, a response token of `sequence[i]`.

    Example: sequences [1 2 3 | 4 5] and [1 2 6 | 7], prompts of three tokens, shared prefix [1 2] (P = 2):
    token_ids [1 2, 3 4, 6], position_ids [0 1, 2 3, 2], lengths (2, 1), target_positions [2 3 4], targets [4 5 7],
    sequence [0 0 1].
    """

    token_ids: torch.Tensor  # [T] int64
    position_ids: torch.Tensor  # [T] int64, within the sequence: own parts start at P
    prefix_tokens: int  # P
    lengths: tuple[int, ...]  # own parts; T = P + sum(lengths)
    target_positions: torch.Tensor  # [R] int64, stream positions whose next token is a response token
    targets: torch.Tensor  # [R] int64
    sequence: torch.Tensor  # [R] int64, which of the B sequences
    num_sequences: int  # B, those with an empty response included

    @property
    def response_lengths(self) -> tuple[int, ...]:
        """How many of the R response tokens each of the B sequences has; they lie in the sequences' order."""
        return tuple(self.sequence.bincount(minlength=self.num_sequences).tolist())

    def by_sequence(self, values: torch.Tensor) -> list[list[float]]:
        """Return the values [R] of the response tokens as a list a sequence."""
        return [part.tolist() for part in values.split(self.response_lengths)]


def micro_batches(lengths: Sequence[int], max_tokens: int, multiple_of: int = 1, at_least: int = 1) -> list[list[int]]:
    """Return the indices of the sequences of each micro-batch: every sequence once, heaviest micro-batch first.

    Balanced by tokens; at most `max_tokens` each unless a sequence alone is longer. Their number is the smallest
    found that fits, is not below `at_least`, and a multiple of `multiple_of` (interleaved pipelines need that).
    Deterministic. Raises ValueError.
    """
    _check_lengths(lengths)
    if max_tokens < 1 or multiple_of < 1:
        raise ValueError(
            f"micro_batches: expected max_tokens and multiple_of of at least 1, got {max_tokens} and {multiple_of}"
        )
    if not lengths:
        return []
    # A longer sequence fills its micro-batch and no more, so it counts as max_tokens here; of two above half, each
    # needs its own; none has room for more than so many of the shortest.
    filled = -(-sum(min(length, max_tokens) for length in lengths) // max_tokens)  # rounded up
    shortest = min(lengths)
    most = max(1, max_tokens // shortest) if shortest else len(lengths)
    at_least = max(at_least, filled, sum(2 * length > max_tokens for length in lengths), -(-len(lengths) // most))
    first = -(-at_least // multiple_of) * multiple_of  # the least multiple that is not below at_least
    for number in range(first, len(lengths) + 1, multiple_of):
        parts = balanced(lengths, number, capacity=len(lengths))
        if all(len(part) <= 1 or sum(lengths[i] for i in part) <= max_tokens for part in parts):
            return sorted(parts, key=lambda part: (-sum(lengths[i] for i in part), part))
    raise ValueError(
        f"micro_batches: {len(lengths)} sequences can't be a multiple of {multiple_of} micro-batches of {max_tokens} "
        "tokens; raise train.micro_batch_tokens or the number of sequences a rank gets"
    )


def balanced(lengths: Sequence[int], parts: int, capacity: int) -> list[list[int]]:
    """Return the indices of the sequences of each part, ascending: at most `capacity`, balanced by tokens.

    Longest first, each to the lightest part that has room.
    """
    heap = [(0, part) for part in range(parts)]
    members: list[list[int]] = [[] for _ in range(parts)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        tokens, part = heapq.heappop(heap)
        members[part].append(index)
        if len(members[part]) < capacity:
            heapq.heappush(heap, (tokens + lengths[index], part))
    return [sorted(indices) for indices in members]


def pack(token_ids: Sequence[Sequence[int]], prompt_tokens: Sequence[int], share_prefix: bool) -> PackedBatch:
    """Return one stream of the sequences `token_ids` (prompt + response), the first `prompt_tokens[b]` being prompt.

    `share_prefix` stores once what all begin with. Raises ValueError for an empty prompt or a prompt longer than
    its sequence. A pack without any response, of one-token prompts, has an empty stream (T = 0).
    """
    _check_sequences(token_ids, prompt_tokens)
    prefix = _common_prefix(token_ids, prompt_tokens) if share_prefix else 0
    stream: list[int] = list(token_ids[0][:prefix])
    position_ids = [torch.arange(prefix)]
    target_positions, targets, lengths = [], [], []
    for ids, prompt in zip(token_ids, prompt_tokens, strict=True):
        start = len(stream) - prefix  # stream position of the sequence's token 0, were its prefix its own
        stream.extend(ids[prefix:-1])
        lengths.append(len(ids) - 1 - prefix)
        position_ids.append(torch.arange(prefix, len(ids) - 1))
        # the last prompt token predicts the first response token, the last token predicts none
        target_positions.append(torch.arange(start + prompt - 1, start + len(ids) - 1))
        targets.extend(ids[prompt:])
    responses = torch.tensor([len(positions) for positions in target_positions])  # [B]
    return PackedBatch(
        token_ids=torch.tensor(stream, dtype=torch.int64),
        position_ids=torch.cat(position_ids),
        prefix_tokens=prefix,
        lengths=tuple(lengths),
        target_positions=torch.cat(target_positions),
        targets=torch.tensor(targets, dtype=torch.int64),
        sequence=torch.repeat_interleave(torch.arange(len(token_ids)), responses),  # [B] -> [R]
        num_sequences=len(token_ids),
    )


def _common_prefix(token_ids: Sequence[Sequence[int]], prompt_tokens: Sequence[int]) -> int:
    """What all sequences begin with, at most one token less than the shortest prompt; 0 for a single sequence."""
    if len(token_ids) == 1:
        return 0
    limit = min(prompt_tokens) - 1
    heads = [tuple(ids[:limit]) for ids in token_ids]
    low, high = min(heads), max(heads)  # all others lie between these two, so they share what the two share
    return next((i for i in range(limit) if low[i] != high[i]), limit)


def _check_sequences(token_ids: Sequence[Sequence[int]], prompt_tokens: Sequence[int]) -> None:
    if not token_ids or len(token_ids) != len(prompt_tokens):
        raise ValueError(
            f"pack: expected one prompt length a sequence and at least one sequence, got {len(token_ids)} sequences "
            f"and {len(prompt_tokens)} prompt lengths"
        )
    for index, (ids, prompt) in enumerate(zip(token_ids, prompt_tokens, strict=True)):
        if prompt < 1:
            raise ValueError(f"pack: sequence {index} has an empty prompt; nothing predicts its first response token")
        if prompt > len(ids):
            raise ValueError(f"pack: sequence {index} has {len(ids)} tokens, fewer than its prompt's {prompt}")


def _check_lengths(lengths: Sequence[int]) -> None:
    if lengths and min(lengths) < 0:
        raise ValueError(f"lengths: expected token counts of at least 0, got {min(lengths)}")
