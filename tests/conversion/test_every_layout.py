"""Every family in every layout: HF -> Megatron ranks -> HF and -> vLLM workers, bitwise, with tensors in memory."""

import itertools
from typing import Any

import pytest
from tiny_models import (
    FAMILIES,
    World,
    assert_equal_worlds,
    config,
    empty_world,
    megatron_world,
    random_weights,
    reference_world,
    vllm_world,
)

from conversion.families import Model, model_from_config
from conversion.plan import plan
from conversion.tiles import ParallelLayout, Tile
from conversion.transfer.pieces import view

# Six layers divide into one, two and three stages, and six chunks; two query groups let tensor=4 cut through them.
SIZES = {"num_hidden_layers": 6, "num_attention_heads": 12, "num_key_value_heads": 2, "intermediate_size": 56}
STAGES: list[dict[str, Any]] = [{"pipeline": 1}, {"pipeline": 2}, {"pipeline": 3}, {"pipeline": 3, "virtual": 2}]


def layouts_of(model: Model) -> list[ParallelLayout]:
    experts = (1, 2) if model.dims.num_experts else (1,)
    return [
        ParallelLayout(tensor=tensor, expert=expert, data=2, vocabulary_multiple=multiple, **stages)  # pyright: ignore[reportArgumentType]
        for tensor, expert, stages, multiple in itertools.product((1, 2, 4), experts, STAGES, (1, 128))
        if multiple == 1 or stages == STAGES[0]
    ]


def moved(source: World, source_tiles: list[Tile], target: World, target_tiles: list[Tile]) -> World:
    """`target`, filled by a plan; it was full of NaN."""
    for copy in plan(source_tiles, target_tiles).copies:
        part = view(source[copy.source.rank], copy.source)
        view(target[copy.target.rank], copy.target).copy_(part)
    return target


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_bitwise_the_same_after_every_layout(family: str, tied: bool) -> None:
    model = model_from_config(config(family, **SIZES, tie_word_embeddings=tied))
    files: World = {0: random_weights(model)}
    engines = {
        tensor: reference_world(model.vllm_tiles(tensor), files[0], vllm_world(model, tensor)) for tensor in (1, 2)
    }
    for layout in layouts_of(model):
        tiles = model.megatron_tiles(layout)
        trainer = moved(files, model.hf_tiles(), megatron_world(model, layout), tiles)
        assert_equal_worlds(trainer, reference_world(tiles, files[0], megatron_world(model, layout)))
        back = moved(trainer, tiles, empty_world({0: model.parameters()}), model.hf_tiles())
        assert_equal_worlds(back, files)
        for tensor, expected in engines.items():
            workers = moved(trainer, tiles, vllm_world(model, tensor), model.vllm_tiles(tensor))
            assert_equal_worlds(workers, expected)
