"""The bucket schedule: every byte once, nothing above the bound, replicas share the load, any odd size."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tiny_models import assert_equal_worlds, carried, config, empty_world, models, random_weights, reference_world

from conversion.families import Model, model_from_config
from conversion.plan import Piece, WeightPlan, plan
from conversion.tiles import ParallelLayout, Tile
from conversion.transfer.buckets import Schedule, part, schedule, wanted

HEADER_BYTES = 64 * 3  # and a line a receiver


def schedules(weights: WeightPlan, layout: ParallelLayout, itemsize: int, bucket_bytes: int) -> list[Schedule]:
    return [schedule(weights, rank, itemsize, bucket_bytes) for rank in range(layout.world_size)]


@given(model=models(), bucket_bytes=st.integers(64, 9000), itemsize=st.sampled_from([2, 4]))
@settings(max_examples=25, deadline=None)
def test_every_element_travels_once_in_buckets_of_bounded_size(model: Model, bucket_bytes: int, itemsize: int) -> None:
    layout = ParallelLayout(tensor=2, pipeline=1, data=2)
    assume(model.dims.num_kv_heads >= 2)
    weights = plan(model.megatron_tiles(layout), model.vllm_tiles(4))
    sent = 0
    for order in schedules(weights, layout, itemsize, bucket_bytes):
        assert max(order.sizes, default=0) <= bucket_bytes
        for bucket, size in zip(order.buckets, order.sizes, strict=True):
            end = 0
            for fragment in bucket:
                assert fragment.offset % 64 == 0 and fragment.offset >= end
                end = fragment.offset + fragment.num_elements * itemsize
                sent += fragment.num_elements
            assert end <= size
    assert sent == model.num_parameters()


@pytest.mark.parametrize("replicas", [{"data": 4}, {"context": 2, "data": 2}], ids=str)
def test_replicas_share_the_bytes(replicas: dict[str, Any]) -> None:
    model = model_from_config(config(num_hidden_layers=8, vocab_size=64))
    layout = ParallelLayout(tensor=2, **replicas)
    weights = plan(model.megatron_tiles(layout), model.vllm_tiles(2))
    sent = [order.total_bytes for order in schedules(weights, layout, 4, 1 << 20)]
    assert sum(sent) == 4 * model.num_parameters()
    assert max(sent) < 1.2 * sum(sent) / len(sent)


@given(
    model=models(),
    layout=st.sampled_from(
        [ParallelLayout(tensor=2, pipeline=2, data=2), ParallelLayout(tensor=2, data=3), ParallelLayout(pipeline=3)]
    ),
    bucket_bytes=st.sampled_from([640, 5000]),
)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_bytes_sent_and_held_stay_below_the_bound(
    model: Model, layout: ParallelLayout, bucket_bytes: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """TP2 PP2 DP2 -> engine TP2 and others: files of two buckets, whatever the size of the embedding."""
    assume(layout.tensor <= model.dims.num_kv_heads and model.num_layers % layout.pipeline == 0)
    source, target = model.megatron_tiles(layout), model.vllm_tiles(2)
    weights = plan(source, target)
    hf = random_weights(model)
    trainer = empty_world({rank: model.megatron_shapes(layout, rank) for rank in range(layout.world_size)})
    workers = empty_world({rank: model.vllm_shapes(2, rank) for rank in range(2)})
    reference_world(source, hf, trainer)
    held_bytes = carried(weights, trainer, workers, tmp_path_factory.mktemp("w"), torch.float32, bucket_bytes)
    assert held_bytes <= 2 * bucket_bytes + HEADER_BYTES + 64 * 2
    expected = empty_world({rank: model.vllm_shapes(2, rank) for rank in range(2)})
    assert_equal_worlds(workers, reference_world(target, hf, expected))
    orders = schedules(weights, layout, 4, bucket_bytes)
    unpadded = sum(4 * f.num_elements for order in orders for bucket in order.buckets for f in bucket)
    assert unpadded == 4 * model.num_parameters()
    assert sum(order.total_bytes for order in orders) < unpadded + 64 * sum(
        len(b) for order in orders for b in order.buckets
    )


@pytest.mark.parametrize("bucket_bytes", [64, 128, 1000, 10_000, 1 << 20])
@pytest.mark.parametrize("shape", [(7, 401), (1, 1), (1, 90), (333, 3), (90,)])
def test_pieces_of_odd_sizes_are_cut_by_rows_or_within_one(
    shape: tuple[int, ...], bucket_bytes: int, tmp_path: Path
) -> None:
    cols = (0, shape[1]) if len(shape) == 2 else None
    weights = plan([Tile(0, "a", "w", (0, shape[0]), cols)], [Tile(0, "b", "w", (0, shape[0]), cols)])
    tensor = torch.arange(float(torch.Size(shape).numel())).view(shape)
    received = torch.full(shape, -1.0)
    carried(weights, {0: {"a": tensor}}, {0: {"b": received}}, tmp_path, torch.float32, bucket_bytes)
    assert torch.equal(received, tensor)
    for bucket in schedule(weights, 0, 4, bucket_bytes).buckets:
        for fragment in bucket:
            rows = fragment.box[0][1] - fragment.box[0][0]
            whole_rows = fragment.num_elements == rows * tensor[0].numel()
            assert whole_rows or 4 * tensor[0].numel() > bucket_bytes  # a row is cut only if it must be


def test_a_bucket_that_holds_nothing_is_refused() -> None:
    model = model_from_config(config())
    weights = plan(model.hf_tiles(), model.vllm_tiles(1))
    with pytest.raises(ValueError, match="bucket_bytes=63: expected at least 64"):
        schedule(weights, 0, 4, 63)


def test_an_expert_axis_on_one_side_only_is_left_alone() -> None:
    matrix = Piece(rank=0, name="m", index=((10, 20), (4, 8)))
    expert = Piece(rank=0, name="e", index=((3, 4), (10, 20), (4, 8)))
    assert part(matrix, ((0, 1), (2, 5), (1, 3))).index == ((12, 15), (5, 7))
    assert part(expert, ((2, 5), (1, 3))).index == ((3, 4), (12, 15), (5, 7))
    assert part(expert, ((0, 1), (2, 5), (1, 3))).index == ((3, 4), (12, 15), (5, 7))


def test_a_receiver_takes_only_what_it_wants() -> None:
    model = model_from_config(config(num_hidden_layers=4))
    weights = plan(model.megatron_tiles(ParallelLayout(tensor=2)), model.vllm_tiles(2))
    order = schedule(weights, 0, 4, 4000)
    taken = [wanted(weights, order, 0, target) for target in range(2)]
    assert len(taken[0]) == len(order.buckets) > 5
    assert 0 < len(taken[1]) < len(order.buckets)  # of rank 0 the second worker wants norms
