"""How the sequences of a mini-batch are shared by ranks: equally many each, in equally many micro-batches."""

import pytest

pytest.importorskip("hypothesis")
pytest.importorskip("pydantic")
pytest.importorskip("yaml")
pytest.importorskip("megatron")
from hypothesis import given
from hypothesis import strategies as st

from astar_megatron.algorithm.packing import micro_batches
from astar_megatron.model.micro_batches import equally_many_micro_batches, split_evenly


@given(lengths=st.lists(st.integers(0, 100), max_size=24), parts=st.integers(1, 6))
def test_an_even_split_gives_each_rank_the_same_number(lengths: list[int], parts: int) -> None:
    lengths = lengths[: len(lengths) // parts * parts]
    shares = split_evenly(lengths, parts)
    assert [len(part) for part in shares] == [len(lengths) // parts] * parts
    assert sorted(i for part in shares for i in part) == list(range(len(lengths)))


def test_an_even_split_balances_tokens_and_refuses_a_remainder() -> None:
    assert [sum([9, 1, 8, 2][i] for i in part) for part in split_evenly([9, 1, 8, 2], 2)] == [10, 10]
    with pytest.raises(ValueError, match="5 sequences can't be shared evenly by 2 ranks"):
        split_evenly([1] * 5, 2)


@given(
    lengths=st.integers(1, 3).flatmap(
        lambda n: st.lists(st.lists(st.integers(0, 40), min_size=4 * n, max_size=4 * n), min_size=1, max_size=4)
    ),
    max_tokens=st.integers(1, 60),
    multiple_of=st.sampled_from([1, 2, 4]),
)
def test_ranks_have_equally_many_micro_batches(lengths: list[list[int]], max_tokens: int, multiple_of: int) -> None:
    batches = equally_many_micro_batches(lengths, max_tokens, multiple_of)
    (number,) = {len(rank) for rank in batches}
    assert number % multiple_of == 0
    assert number >= max(len(micro_batches(own, max_tokens, multiple_of)) for own in lengths)
    for own, rank in zip(lengths, batches, strict=True):
        assert sorted(i for part in rank for i in part) == list(range(len(own)))
        assert all(len(part) <= 1 or sum(own[i] for i in part) <= max_tokens for part in rank)
