"""Packs for FP8: padded to the multiple of tokens that its products take, which no response notices."""

import pytest
import torch

from astar_megatron.algorithm.packing import pack
from astar_megatron.model.split import rank_stream

TOKEN_IDS = [[1, 2, 3, 4, 10, 11, 12], [1, 2, 3, 5, 12], [1, 2, 7, 8, 9, 10, 11, 12, 13]]
PROMPTS = [4, 4, 3]


@pytest.mark.parametrize(("tensor", "context"), [(1, 1), (2, 1), (1, 2), (3, 2)])
@pytest.mark.parametrize("align", [1, 8, 32])
def test_every_ranks_part_is_a_multiple_and_predicts_the_same_tokens(tensor: int, context: int, align: int) -> None:
    packed = pack(TOKEN_IDS, PROMPTS, share_prefix=context == 1)
    rows = []
    for rank in range(context):
        stream = rank_stream(packed, tensor=tensor, context=context, rank=rank, align=align)
        assert len(stream.token_ids) % (tensor * align) == 0
        before = packed.token_ids[packed.target_positions[stream.rows]]
        assert torch.equal(stream.token_ids[stream.positions], before)
        assert torch.equal(stream.targets, packed.targets[stream.rows])
        rows += stream.rows.tolist()
    assert sorted(rows) == list(range(len(packed.targets)))
