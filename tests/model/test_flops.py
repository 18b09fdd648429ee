"""Model FLOPs of a pack against torch's own count, and how packing changes them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")
pytest.importorskip("transformers")
from transformers import AutoModelForCausalLM

from astar_megatron.algorithm.packing import pack
from astar_megatron.model.flops import forward_flops
from conversion.families import read_model


def _pairs(length: int) -> int:
    return length * (length + 1) // 2


@pytest.mark.parametrize("kind", ["tied_llama", "untied_qwen2", "qwen3", "mistral"])
def test_linear_layers_and_head_are_what_torch_counts(
    kind: str, request: pytest.FixtureRequest, tiny_family: Callable[..., Path]
) -> None:
    """torch counts attention over all pairs, so it is compared apart: pairs are what the causal mask leaves."""
    family = kind in ("qwen3", "mistral")
    folder = tiny_family(kind) if family else request.getfixturevalue(kind)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    length = 23
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(3, 3 + length)[None])
    counts = {operator.__name__: flops for operator, flops in counter.get_flop_counts()["Global"].items()}
    attention = counts.pop("bmm")
    dims = read_model(str(folder)).dims
    ids = list(range(3, 4 + length))  # the last token predicts nothing; a prompt of one token leaves all to predict
    counted = forward_flops(read_model(str(folder)), pack([ids], [1], share_prefix=False))
    heads = 4 * dims.num_heads * dims.head_dim * dims.num_layers
    assert attention >= heads * length * length  # and the rotary angles
    assert counted - heads * _pairs(length) == pytest.approx(sum(counts.values()), rel=1e-3)


def test_experts_count_as_many_as_a_token_goes_to(tiny_family: Callable[..., Path]) -> None:
    dense, sparse = read_model(str(tiny_family("qwen3"))), read_model(str(tiny_family("qwen3_moe")))
    packed = pack([list(range(9))], [3], share_prefix=False)
    dims = sparse.dims
    per_token = (
        3 * dims.hidden_size * (dims.moe_intermediate_size * dims.experts_per_token - dims.intermediate_size)
        + dims.hidden_size * dims.num_experts
    )
    difference = forward_flops(sparse, packed) - forward_flops(dense, packed)
    assert difference == 2 * 8 * dims.num_layers * per_token


def test_a_shared_prefix_is_counted_once_and_a_prompt_costs_no_head(tied_llama: Path) -> None:
    model = read_model(str(tied_llama))
    token_ids = [[1, 2, 3, 4, 10, 11], [1, 2, 3, 5, 12]]
    shared = forward_flops(model, pack(token_ids, [4, 4], share_prefix=True))
    apart = [forward_flops(model, pack([ids], [4], share_prefix=False)) for ids in token_ids]
    prefix = forward_flops(model, pack([[1, 2, 3, 4]], [4], share_prefix=False))  # three positions, no response
    assert shared == sum(apart) - prefix
