"""A pack split over ranks is the same pack, and attention over the parts is attention over the whole."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("hypothesis")
pytest.importorskip("pydantic")
pytest.importorskip("yaml")
pytest.importorskip("megatron")
from hypothesis import given
from hypothesis import strategies as st

from astar_megatron.algorithm.packing import PackedBatch, pack
from astar_megatron.model import backend
from astar_megatron.model.split import rank_stream

backend.choose()  # megatron asks for it before it is imported


@st.composite
def packs(draw: st.DrawFn) -> PackedBatch:
    """Ragged sequences, some without a response, some of one token."""
    token_ids, prompts = [], []
    for _ in range(draw(st.integers(1, 5))):
        ids = draw(st.lists(st.integers(1, 50), min_size=1, max_size=19))
        token_ids.append(ids)
        prompts.append(draw(st.integers(1, len(ids))))
    return pack(token_ids, prompts, share_prefix=False)


@given(packed=packs(), tensor=st.integers(1, 3), context=st.integers(1, 4), align=st.sampled_from([1, 1, 8, 32]))
def test_ranks_hold_every_token_and_every_target_once(
    packed: PackedBatch, tensor: int, context: int, align: int
) -> None:
    """`align` is what FP8's products take a multiple of."""
    sizes = {"tensor": tensor, "context": context, "align": align}
    streams = [rank_stream(packed, **sizes, rank=rank) for rank in range(context)]
    assert len({len(stream.token_ids) for stream in streams}) == 1
    assert len(streams[0].token_ids) % (tensor * align) == 0 and len(streams[0].token_ids)
    together = torch.cat([stream.token_ids for stream in streams])
    positions = torch.cat([stream.position_ids for stream in streams])
    order = torch.arange(len(together)) if context == 1 else streams[0].order
    assert order is not None and sorted(order.tolist()) == list(range(len(together)))
    whole, start = 0, 0
    for own, padded in zip(packed.lengths, streams[0].lengths, strict=True):
        assert padded >= own and padded % (2 * context if context > 1 else 1) == 0
        assert together[order][whole : whole + own].tolist() == packed.token_ids[start : start + own].tolist()
        assert positions[order][whole : whole + padded].tolist() == list(range(padded))
        whole, start = whole + padded, start + own
    assert whole == len(together)

    rows = torch.cat([stream.rows for stream in streams])
    assert sorted(rows.tolist()) == list(range(len(packed.targets)))
    for stream in streams:
        assert torch.equal(stream.targets, packed.targets[stream.rows])
        before = packed.token_ids[packed.target_positions[stream.rows]]
        assert torch.equal(stream.token_ids[stream.positions], before)
        assert torch.equal(
            stream.position_ids[stream.positions], packed.position_ids[packed.target_positions][stream.rows]
        )
        counts = packed.sequence[stream.rows].bincount(minlength=packed.num_sequences).tolist()
        assert list(stream.response_lengths) == counts
        assert stream.rows.tolist() == sorted(stream.rows.tolist())  # sequence after sequence
    most = [max(counts) for counts in zip(*(stream.response_lengths for stream in streams), strict=True)]
    assert list(streams[0].most_responses) == most


def test_a_shared_prefix_stays_whole_and_padding_goes_to_the_end() -> None:
    packed = pack([[7, 8, 1, 2, 3], [7, 8, 4]], [3, 3], share_prefix=True)
    stream = rank_stream(packed, tensor=3)
    assert stream.token_ids.tolist() == [7, 8, 1, 2, 0, 0]
    assert stream.position_ids.tolist() == [0, 1, 2, 3, 2, 3]
    assert (stream.prefix_tokens, stream.lengths, stream.order) == (2, (2, 2), None)
    assert stream.positions.tolist() == packed.target_positions.tolist()
    aligned = rank_stream(packed, align=32)
    assert len(aligned.token_ids) == 32 and aligned.positions.tolist() == packed.target_positions.tolist()


def attention_of_a_layer(kind: Any) -> Any:
    """PackedAttention, or a kind of it, as a layer has it, but for what megatron's configuration sets."""
    attention = kind.__new__(kind)
    torch.nn.Module.__init__(attention)
    attention.scale, attention.config = 0.3, SimpleNamespace()
    return attention


def test_each_rank_has_the_same_number_of_causal_pairs() -> None:
    packed = pack([list(range(1, 50))], [3], share_prefix=False)
    pairs = [int((rank_stream(packed, context=4, rank=rank).position_ids + 1).sum()) for rank in range(4)]
    assert len(set(pairs)) == 1


@pytest.mark.parametrize("lengths", [(9, 7, 8), (3, 41, 2, 5)], ids=["alike: padded", "ragged: one by one"])
@pytest.mark.parametrize("context", [2, 3])
def test_attention_of_the_parts_is_attention_of_the_whole(lengths: tuple[int, ...], context: int) -> None:
    from astar_megatron.model.attention import PackedAttention, PackedSequences

    packed = pack([list(range(1, length + 2)) for length in lengths], [1] * len(lengths), share_prefix=False)
    attention = attention_of_a_layer(PackedAttention)
    streams = [rank_stream(packed, context=context, rank=rank) for rank in range(context)]
    total = sum(streams[0].lengths)
    generator = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(total, heads, 5, generator=generator) for heads in (6, 2, 2))
    everything = PackedSequences(position_ids=None, lengths=streams[0].lengths)
    wanted = attention(*(x.unsqueeze(1) for x in (query, key, value)), packed_seq_params=everything)
    order = streams[0].order
    assert order is not None
    places = order.argsort()  # stream positions, rank after rank
    size = total // context
    parts = []
    for rank, stream in enumerate(streams):
        own = PackedSequences(position_ids=stream.position_ids, lengths=stream.lengths, order=order)
        mine = places[rank * size : (rank + 1) * size]
        parts.append(attention.own_queries(query[mine], key, value, own).flatten(1))
    torch.testing.assert_close(torch.cat(parts)[order], wanted.squeeze(1), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("lengths", [(9, 7, 8), (3, 41, 0, 2, 5)], ids=["alike: padded", "ragged: one by one"])
def test_a_shared_prefix_is_computed_once_and_seen_by_all(lengths: tuple[int, ...]) -> None:
    from astar_megatron.model.attention import PackedAttention, PackedSequences

    attention, num_prefix = attention_of_a_layer(PackedAttention), 4
    generator = torch.Generator().manual_seed(3)
    total = num_prefix + sum(lengths)
    stream = [torch.randn(total, 1, heads, 5, generator=generator) for heads in (6, 2, 2)]
    together = attention(*stream, packed_seq_params=PackedSequences(prefix_tokens=num_prefix, lengths=lengths))
    for index, length in enumerate(lengths):
        start = num_prefix + sum(lengths[:index])
        rows = [*range(num_prefix), *range(start, start + length)]
        whole = PackedSequences(lengths=(len(rows),))
        alone = attention(*(x[rows] for x in stream), packed_seq_params=whole)
        torch.testing.assert_close(together[rows], alone, atol=1e-6, rtol=1e-5)


def test_one_long_sequence_does_not_pad_the_others() -> None:
    from astar_megatron.model.attention import PackedAttention, PackedSequences

    attended: list[int] = []

    class Counted(PackedAttention):
        def _attend(self, tensors: list[torch.Tensor], **options: Any) -> torch.Tensor:
            attended.append(tensors[0].size(0) * tensors[0].size(1))
            return super()._attend(tensors, **options)

    lengths, num_prefix = (100, *[3] * 30), 4
    stream = [torch.zeros(num_prefix + sum(lengths), 1, heads, 5) for heads in (6, 2, 2)]
    attention = attention_of_a_layer(Counted)
    attention(*stream, packed_seq_params=PackedSequences(prefix_tokens=num_prefix, lengths=lengths))
    assert sum(attended) == num_prefix + sum(lengths)
