"""Packs and micro-batches: nothing is lost, nothing is padded; property (v) of the design."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from astar_megatron.algorithm.packing import PackedBatch, micro_batches, pack

EOS = PAD = 2


@st.composite
def _sequences(draw: st.DrawFn) -> tuple[list[list[int]], list[int]]:
    """Sequences of a small vocabulary that often begin alike; prompts of at least one token."""
    common = draw(st.lists(st.integers(0, 3), max_size=6))
    token_ids, prompt_tokens = [], []
    for _ in range(draw(st.integers(1, 5))):
        ids = common + draw(st.lists(st.integers(0, 3), min_size=1, max_size=8))
        token_ids.append(ids)
        prompt_tokens.append(draw(st.integers(1, len(ids))))
    return token_ids, prompt_tokens


def _unpacked(batch: PackedBatch) -> list[tuple[list[int], list[int]]]:
    """Of each sequence: its tokens without the last, and its response."""
    stream, prefix = batch.token_ids.tolist(), batch.prefix_tokens
    sequences, start = [], prefix
    for index, length in enumerate(batch.lengths):
        sequences.append(
            (stream[:prefix] + stream[start : start + length], batch.targets[batch.sequence == index].tolist())
        )
        start += length
    assert start == len(stream)
    return sequences


@given(sequences=_sequences(), share_prefix=st.booleans())
def test_unpacking_a_pack_gives_every_sequence_back(
    sequences: tuple[list[list[int]], list[int]], share_prefix: bool
) -> None:
    token_ids, prompt_tokens = sequences
    batch = pack(token_ids, prompt_tokens, share_prefix)
    assert batch.num_sequences == len(token_ids)
    assert _unpacked(batch) == [(ids[:-1], ids[n:]) for ids, n in zip(token_ids, prompt_tokens, strict=True)]


@given(sequences=_sequences(), share_prefix=st.booleans())
def test_each_target_follows_its_position_in_an_own_part(
    sequences: tuple[list[list[int]], list[int]], share_prefix: bool
) -> None:
    token_ids, prompt_tokens = sequences
    batch = pack(token_ids, prompt_tokens, share_prefix)
    assert len(batch.token_ids) == len(batch.position_ids) == batch.prefix_tokens + sum(batch.lengths)
    assert batch.prefix_tokens < min(prompt_tokens)
    expected = [(b, i) for b, ids in enumerate(token_ids) for i in range(prompt_tokens[b], len(ids))]
    assert len(expected) == len(batch.targets)
    starts = [batch.prefix_tokens + sum(batch.lengths[:b]) for b in range(len(token_ids))]
    for (b, i), position, target, sequence in zip(
        expected, batch.target_positions.tolist(), batch.targets.tolist(), batch.sequence.tolist(), strict=True
    ):
        assert sequence == b
        assert target == token_ids[b][i]
        assert batch.position_ids[position] == i - 1
        assert batch.token_ids[position] == token_ids[b][i - 1]
        assert starts[b] <= position < starts[b] + batch.lengths[b]


@given(sequences=_sequences())
def test_the_shared_prefix_is_the_longest_possible(sequences: tuple[list[list[int]], list[int]]) -> None:
    token_ids, prompt_tokens = sequences
    prefix = pack(token_ids, prompt_tokens, share_prefix=True).prefix_tokens
    limit = min(prompt_tokens) - 1
    assert all(ids[:prefix] == token_ids[0][:prefix] for ids in token_ids)
    if len(token_ids) == 1:
        assert prefix == 0
    elif prefix < limit:
        assert len({ids[prefix] for ids in token_ids}) > 1


@pytest.mark.parametrize("share_prefix", [False, True])
def test_v_eos_stays_in_the_mask_where_pad_equals_eos(share_prefix: bool) -> None:
    # A prompt that holds EOS, a response that holds it twice, a truncated one, one that is EOS alone.
    token_ids = [[1, EOS, 5, 7, EOS], [1, EOS, 5, PAD, EOS], [1, EOS, 5, 8], [1, EOS, 5, EOS]]
    batch = pack(token_ids, [3, 3, 3, 3], share_prefix)
    assert batch.targets.tolist() == [7, EOS, PAD, EOS, 8, EOS]
    assert batch.sequence.tolist() == [0, 0, 1, 1, 2, 3]
    assert batch.prefix_tokens == (2 if share_prefix else 0)


def test_the_example_of_the_docstring_holds() -> None:
    batch = pack([[1, 2, 3, 4, 5], [1, 2, 6, 7]], [3, 3], share_prefix=True)
    assert batch.token_ids.tolist() == [1, 2, 3, 4, 6]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 2]
    assert batch.lengths == (2, 1)
    assert batch.target_positions.tolist() == [2, 3, 4]
    assert batch.targets.tolist() == [4, 5, 7]
    assert batch.sequence.tolist() == [0, 0, 1]


def test_an_empty_response_has_no_positions_but_counts() -> None:
    batch = pack([[1, 2], [1, 2, 3]], [2, 2], share_prefix=False)
    assert batch.num_sequences == 2
    assert batch.sequence.tolist() == [1]
    alone = pack([[4]], [1], share_prefix=True)
    assert (alone.lengths, alone.token_ids.tolist(), alone.targets.tolist()) == ((0,), [], [])


@pytest.mark.parametrize(
    ("token_ids", "prompt_tokens", "message"),
    [
        ([], [], "at least one sequence"),
        ([[1]], [1, 2], "1 sequences and 2 prompt lengths"),
        ([[1, 2]], [0], "sequence 0 has an empty prompt"),
        ([[1, 2], [3]], [1, 2], "sequence 1 has 1 tokens, fewer than its prompt's 2"),
    ],
)
def test_impossible_packs_are_refused(token_ids: list[list[int]], prompt_tokens: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(token_ids, prompt_tokens, share_prefix=True)


@given(lengths=st.lists(st.integers(0, 40), max_size=40), max_tokens=st.integers(1, 60))
def test_micro_batches_hold_every_sequence_once_within_the_limit(lengths: list[int], max_tokens: int) -> None:
    parts = micro_batches(lengths, max_tokens)
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    assert all(parts)
    assert all(len(part) == 1 or sum(lengths[i] for i in part) <= max_tokens for part in parts)
    assert parts == micro_batches(lengths, max_tokens)


def test_micro_batches_are_few_and_balanced() -> None:
    lengths = [100, 900, 500, 500, 300, 700] * 10
    parts = micro_batches(lengths, 3100)
    tokens = [sum(lengths[i] for i in part) for part in parts]
    assert len(parts) == 10
    assert max(tokens) - min(tokens) <= 100
    assert tokens == sorted(tokens, reverse=True)
    assert len(micro_batches(lengths, 3100, multiple_of=4)) == 12
    assert [len(part) for part in micro_batches([100] * 50, 290)] == [2] * 25


def test_a_sequence_longer_than_the_limit_goes_alone() -> None:
    assert micro_batches([50, 3, 4], 10) == [[0], [1, 2]]
    assert micro_batches([], 10) == []


def test_impossible_micro_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        micro_batches([5, 5, 5], 10, multiple_of=4)
    with pytest.raises(ValueError, match="at least 1"):
        micro_batches([5], 0)
    with pytest.raises(ValueError, match="at least 0"):
        micro_batches([5, -1], 10)
