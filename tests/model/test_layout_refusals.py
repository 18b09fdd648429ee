"""Layouts that can't run are refused by the number that does not fit, with a part of them that does."""

import re
from typing import Any

import pytest

pytest.importorskip("hypothesis")
pytest.importorskip("pydantic")
pytest.importorskip("yaml")
from hypothesis import given
from hypothesis import strategies as st

from astar_megatron.config import ParallelConfig
from astar_megatron.model.layouts import LayoutError, check, layout_of, parts
from conversion.families import Model, model_from_config

SIZES = {
    "num_hidden_layers": 6,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 263,
    "max_position_embeddings": 160,
    "rms_norm_eps": 1e-5,
}
EXPERTS = {"num_experts": 10, "num_experts_per_tok": 3, "moe_intermediate_size": 28, "norm_topk_prob": True}


def model(*, experts: bool = False) -> Model:
    if not experts:
        return model_from_config(SIZES | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    kind = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "head_dim": 32}
    return model_from_config(SIZES | kind | EXPERTS)


def refused(parallel: ParallelConfig, *, experts: bool = False) -> str:
    with pytest.raises(LayoutError) as caught:
        check(parallel, model(experts=experts), sequences=8)
    return str(caught.value)


def proposed(message: str) -> ParallelConfig:
    """The layout a message proposes, as a user would write it down."""
    axes: dict[str, Any] = {
        axis: int(size) for axis, size in re.findall(r"(\w+)=(\d+)", message.rpartition("that fits: ")[2])
    }
    return ParallelConfig(**axes)


@pytest.mark.parametrize(
    ("axes", "number", "experts"),
    [
        ({"pipeline": 4}, "num_hidden_layers=6", False),
        ({"pipeline": 2, "virtual": 2}, "num_hidden_layers=6", False),
        ({"tensor": 4}, "num_attention_heads=6", False),
        ({"tensor": 3}, "num_key_value_heads=2", False),
        ({"data": 4, "expert": 4}, "num_experts=10", True),
        ({"data": 2, "expert": 2}, "expert=2", False),
        ({"data": 2, "expert": 3}, "no experts", False),
        ({"data": 4, "expert": 3}, "does not divide by expert=3", True),
        ({"context": 2, "expert": 4}, "does not divide by expert=4", True),
        ({"virtual": 2}, "virtual=2 needs pipeline > 1", False),
        ({"pipeline": 3, "virtual": 2}, "8 sequences", False),
    ],
)
def test_what_does_not_divide_is_named_and_what_would_is_proposed(
    axes: dict[str, Any], number: str, experts: bool
) -> None:
    message = refused(ParallelConfig(**axes), experts=experts)
    assert message.startswith("parallel: ") and number in message
    assert "; of the sizes" not in message  # advice that knows one size of the model alone
    check(proposed(message), model(experts=experts), sequences=8)


def test_parts_of_a_layout_are_listed_by_their_ranks_the_model_s_own_limits_kept() -> None:
    listed = list(parts(ParallelConfig(tensor=4, pipeline=2, data=2), model(), sequences=8))
    assert [part.world_size for part in listed] == [8, 4, 4, 4, 2, 2, 2, 1]
    assert all(part.tensor <= 2 for part in listed)  # 4 does not divide the model's 6 heads
    for part in listed:
        check(part, model(), sequences=8)


@given(
    sizes=st.fixed_dictionaries(
        {axis: st.integers(1, 5) for axis in ("tensor", "pipeline", "context", "data")} | {"virtual": st.integers(1, 3)}
    ),
    sequences=st.integers(1, 12),
)
def test_every_refusal_proposes_a_layout_that_is_accepted(sizes: dict[str, Any], sequences: int) -> None:
    try:
        check(ParallelConfig(**sizes), model(), sequences=sequences)
    except LayoutError as error:
        check(proposed(str(error)), model(), sequences=sequences)


def test_a_layout_has_the_configured_axes() -> None:
    sizes: dict[str, Any] = {"tensor": 2, "pipeline": 3, "virtual": 2, "context": 4, "data": 5, "expert": 10}
    layout = layout_of(ParallelConfig(**sizes), fused_norms=True)
    assert {axis: getattr(layout, axis) for axis in sizes} == sizes
    assert layout.fused_norms and layout.world_size == 120
    assert ParallelConfig(**sizes).describe() == "tensor=2 pipeline=3 virtual=2 context=4 data=5 expert=10"
