"""Plans: bitwise round trips between all ends in buckets of any size, and coverage."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from exports import write_export
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tiny_models import (
    assert_equal_worlds,
    carried,
    config,
    empty_world,
    fits,
    layouts,
    megatron_world,
    models,
    random_weights,
    reference_world,
    vllm_world,
    write_folder,
)

from conversion import hf
from conversion.families import Model, model_from_config
from conversion.plan import PlanError, plan
from conversion.tiles import ParallelLayout, Tile
from conversion.transfer.shared_memory import SharedMemorySender


@given(
    model=models(),
    layout=layouts(),
    other=layouts(),
    engine=st.sampled_from([1, 2, 4, 8]),
    bucket_bytes=st.sampled_from([2000, 1 << 26]),
)
@settings(
    max_examples=15,  # of which most pairs of layouts fit few models
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)
def test_import_export_sync_and_reshape_are_bitwise(
    model: Model,
    layout: ParallelLayout,
    other: ParallelLayout,
    engine: int,
    bucket_bytes: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    for chosen in (layout, other):
        assume(fits(model, chosen))
    folder = tmp_path_factory.mktemp("weights")
    weights = random_weights(model)
    source = write_folder(folder / "source", model, weights)

    trainer = megatron_world(model, layout)  # import: files -> Megatron
    tiles = model.megatron_tiles(layout)
    for rank, tensors in trainer.items():
        hf.load(source, plan(model.hf_tiles(), tiles), rank, tensors)
    assert_equal_worlds(trainer, reference_world(tiles, weights, megatron_world(model, layout)))

    exported = empty_world({0: model.parameters()})  # export: Megatron -> files
    carried(plan(tiles, model.hf_tiles()), trainer, exported, folder, torch.float32, bucket_bytes)
    write_export(folder / "export", exported[0], source, max_shard_bytes=20_000)
    back = empty_world({0: model.parameters()})
    hf.load(folder / "export", plan(model.hf_tiles(), model.hf_tiles()), 0, back[0])
    assert_equal_worlds(back, {0: weights})

    workers = vllm_world(model, engine)  # sync: Megatron -> vLLM
    carried(plan(tiles, model.vllm_tiles(engine)), trainer, workers, folder, torch.float32, bucket_bytes)
    assert_equal_worlds(workers, reference_world(model.vllm_tiles(engine), weights, vllm_world(model, engine)))

    reshaped = megatron_world(model, other)  # reshape: Megatron -> Megatron
    carried(plan(tiles, model.megatron_tiles(other)), trainer, reshaped, folder, torch.float32, bucket_bytes)
    expected = reference_world(model.megatron_tiles(other), weights, megatron_world(model, other))
    assert_equal_worlds(reshaped, expected)

    from_engine = empty_world({0: model.parameters()})  # and what an engine holds, read back
    carried(plan(model.vllm_tiles(engine), model.hf_tiles()), workers, from_engine, folder, torch.float32, bucket_bytes)
    assert_equal_worlds(from_engine, {0: weights})


def test_the_wire_may_have_another_dtype(tmp_path: Path) -> None:
    model, layout = model_from_config(config("qwen2")), ParallelLayout(tensor=2)
    weights = random_weights(model)
    trainer = reference_world(model.megatron_tiles(layout), weights, megatron_world(model, layout))
    workers = vllm_world(model, 2, torch.bfloat16)
    carried(plan(model.megatron_tiles(layout), model.vllm_tiles(2)), trainer, workers, tmp_path, torch.bfloat16)
    rounded = {name: tensor.bfloat16() for name, tensor in weights.items()}
    expected = reference_world(model.vllm_tiles(2), rounded, vllm_world(model, 2, torch.bfloat16))
    assert_equal_worlds(workers, expected)


def test_what_the_source_lacks_is_named() -> None:
    model = model_from_config(config())
    tiles = model.megatron_tiles(ParallelLayout(tensor=2))
    without_rank_1 = [tile for tile in tiles if tile.rank == 0]
    with pytest.raises(PlanError, match=r"model\.embed_tokens\.weight: .* rows 66:131, columns 0:48, .* target rank 0"):
        plan(without_rank_1, model.vllm_tiles(1))
    without_norm = [tile for tile in tiles if tile.hf != "model.norm.weight"]
    with pytest.raises(PlanError, match=r"model\.norm\.weight: .* rows 0:48, for"):
        plan(without_norm, model.hf_tiles())
    short = [replace(tile, cols=(0, 40)) if tile.hf.endswith("0.mlp.down_proj.weight") else tile for tile in tiles]
    with pytest.raises(PlanError, match=r"layers\.0\.mlp\.down_proj\.weight: .* columns 40:56"):
        plan(short, model.hf_tiles())


def test_source_tiles_that_overlap_in_part_are_refused() -> None:
    source = [Tile(0, "a", "w", (0, 6), (0, 4)), Tile(1, "a", "w", (4, 10), (0, 4))]
    with pytest.raises(PlanError, match="overlap in part"):
        plan(source, [Tile(0, "b", "w", (0, 10), (0, 4))])
    with pytest.raises(PlanError, match="a vector in the source and a matrix"):
        plan([Tile(0, "a", "w", (0, 10), None)], [Tile(0, "b", "w", (0, 10), (0, 4))])


def test_a_72b_model_is_planned_in_about_as_many_copies_as_it_has_tiles() -> None:
    sizes = {"num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 29568, "vocab_size": 152064}
    model = model_from_config(config("qwen2", **sizes, num_attention_heads=64, num_key_value_heads=8))
    source, target = model.megatron_tiles(ParallelLayout(tensor=8, pipeline=8)), model.vllm_tiles(8)
    weights = plan(source, target)
    assert len(target) <= len(weights.copies) <= 2 * len(target)
    assert sum(copy.source.num_elements for copy in weights.copies) > model.num_parameters() > 72e9


def test_of_many_replicas_the_first_send_and_the_plan_is_that_over_all() -> None:
    model, layout = model_from_config(config()), ParallelLayout(tensor=2, data=100)
    senders = layout.senders()
    assert {layout.coordinates(rank)[2] for rank in senders} == set(range(64)) and len(senders) == 128
    of_senders, of_all = (plan(model.megatron_tiles(layout, ranks), model.vllm_tiles(2)) for ranks in (senders, None))
    assert of_senders == of_all
    assert ParallelLayout(tensor=2, data=4, context=2).senders() == list(range(16))
    assert len(ParallelLayout(data=256, expert=128).senders()) == 128  # each expert once


def test_a_rank_that_is_no_sender_sends_nothing(tmp_path: Path) -> None:
    model, layout = model_from_config(config()), ParallelLayout(tensor=2, data=100)
    weights = plan(model.megatron_tiles(layout, layout.senders()), model.vllm_tiles(1))
    tensors = {name: torch.zeros(shape) for name, shape in model.megatron_shapes(layout, 199).items()}
    sender = SharedMemorySender(weights, 199, tensors, tmp_path)
    for version in (1, 2):
        sender.send(version)  # returns, although nobody takes anything
    sender.close()
