"""The verification: equal weights have equal digests in every layout, and each fault is found and named."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny_models import World, config, empty_world, models, random_weights, reference_world

from conversion.families import Model, model_from_config
from conversion.plan import Piece, WeightMismatch, WeightPlan, plan
from conversion.tiles import ParallelLayout
from conversion.verify import (
    Holdings,
    Manifest,
    Part,
    Verifier,
    digest,
    held_parts,
    mismatch,
    sent_parts,
    tensor_digests,
)

MODEL = model_from_config(config("qwen2", num_attention_heads=8, num_key_value_heads=2, hidden_size=64))
LAYOUT = ParallelLayout(tensor=2, pipeline=2, data=2)
VERSION = 9


@dataclass
class Ends:
    """A trainer and the workers of an engine that hold the same weights, and the plan between them."""

    weights: WeightPlan
    trainer: World
    workers: World
    dtype: torch.dtype

    def manifest(self) -> Manifest:
        sent = {
            rank: Holdings(sent_parts(self.weights, rank), tensors, self.dtype).digests()
            for rank, tensors in self.trainer.items()
        }
        return self.verifier.manifest(VERSION, sent)

    @property
    def verifier(self) -> Verifier:
        return Verifier(self.weights)

    def verify(self) -> None:
        """Raises WeightMismatch, as WeightSync does."""
        expected = self.manifest()
        for rank, tensors in self.workers.items():
            holdings = Holdings(held_parts(self.weights, rank), tensors, self.dtype)
            index = self.verifier.first_mismatch(expected, rank, holdings.digests())
            if index is not None:
                source, at = self.verifier.origin(rank, index)
                sent = Holdings(sent_parts(self.weights, source), self.trainer[source], self.dtype).rows(at)
                raise mismatch(VERSION, holdings.parts[index], f"worker {rank}", sent, holdings.rows(index))


def ends(model: Model, layout: ParallelLayout, engine: int, dtype: torch.dtype = torch.float32) -> Ends:
    hf = random_weights(model)
    source, target = model.megatron_tiles(layout), model.vllm_tiles(engine)
    trainer = empty_world({rank: model.megatron_shapes(layout, rank) for rank in range(layout.world_size)})
    workers = empty_world({rank: model.vllm_shapes(engine, rank) for rank in range(engine)}, dtype)
    rounded = {name: tensor.to(dtype) for name, tensor in hf.items()}
    return Ends(
        plan(source, target), reference_world(source, hf, trainer), reference_world(target, rounded, workers), dtype
    )


@given(
    model=models(),
    tensor=st.sampled_from([1, 2, 4]),
    pipeline=st.sampled_from([1, 2, 3]),
    engine=st.sampled_from([1, 2, 4, 8]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
@settings(max_examples=20, deadline=None)
def test_equal_weights_have_equal_digests_in_every_layout(
    model: Model, tensor: int, pipeline: int, engine: int, dtype: torch.dtype
) -> None:
    assume(tensor <= model.dims.num_kv_heads and model.num_layers % pipeline == 0)
    both = ends(model, ParallelLayout(tensor=tensor, pipeline=pipeline, data=2), engine, dtype)
    both.verify()


def test_digests_of_shards_add_up_to_those_of_the_export() -> None:
    both = ends(MODEL, LAYOUT, 4)
    whole = plan(MODEL.megatron_tiles(LAYOUT), MODEL.hf_tiles())
    exported = Ends(whole, both.trainer, {}, torch.float32).manifest()
    assert exported.digests_by_name() == tensor_digests(random_weights(MODEL))


def kv_rows(which: int) -> slice:
    """The rows of key head `which` of a worker that holds one, in qkv of 2 query heads, a key and a value head."""
    return slice((2 + which) * 8, (3 + which) * 8)


def flip_a_bit(workers: World) -> None:
    bits = workers[1]["model.layers.1.mlp.down_proj.weight"].view(torch.int32)
    bits[5, 3] ^= 1


def swap_gate_and_up(workers: World) -> None:
    fused = workers[2]["model.layers.0.mlp.gate_up_proj.weight"]
    fused.copy_(torch.cat(fused.chunk(2)[::-1]))


def take_the_wrong_key_head(workers: World) -> None:
    name = "model.layers.0.self_attn.qkv_proj.weight"
    workers[1][name][kv_rows(0)] = workers[2][name][kv_rows(0)]


def swap_two_rows(workers: World) -> None:
    embedding = workers[0]["model.embed_tokens.weight"]
    embedding[[3, 7]] = embedding[[7, 3]]


def swap_two_columns(workers: World) -> None:
    head = workers[2]["lm_head.weight"]  # the fourth worker's share of it is all padding
    head[:, [0, 1]] = head[:, [1, 0]]


def keep_an_old_norm(workers: World) -> None:
    workers[2]["model.norm.weight"][:] = 1.0


FAULTS: list[tuple[Callable[[World], None], str, int, int]] = [
    (flip_a_bit, "model.layers.1.mlp.down_proj.weight", 1, 5),
    (swap_gate_and_up, "model.layers.0.mlp.gate_proj.weight", 2, 28),
    (take_the_wrong_key_head, "model.layers.0.self_attn.k_proj.weight", 1, 0),
    (swap_two_rows, "model.embed_tokens.weight", 0, 3),
    (swap_two_columns, "lm_head.weight", 2, 96),
    (keep_an_old_norm, "model.norm.weight", 2, 0),
]


@pytest.mark.parametrize(("fault", "tensor", "worker", "row"), FAULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_fault_in_what_a_worker_holds_is_found_and_named(
    fault: Callable[[World], None], tensor: str, worker: int, row: int
) -> None:
    both = ends(MODEL, LAYOUT, 4)
    both.verify()  # without the fault it passes
    fault(both.workers)
    with pytest.raises(WeightMismatch) as caught:
        both.verify()
    assert (caught.value.tensor, caught.value.where) == (tensor, f"worker {worker}")
    assert caught.value.row == row
    assert f"version {VERSION}: worker {worker} does not hold {tensor}" in str(caught.value)


@pytest.mark.parametrize(
    ("dtype", "bits"), [(torch.float32, torch.int32), (torch.bfloat16, torch.int16), (torch.float16, torch.int16)]
)
@pytest.mark.parametrize("columns", [(2, 7), (3, 7), (0, 6)])
def test_every_bit_of_every_element_counts(dtype: torch.dtype, bits: torch.dtype, columns: tuple[int, int]) -> None:
    width, size = columns[1] - columns[0], 8 * dtype.itemsize
    tensor = torch.zeros(3, width, dtype=dtype)
    part = Part(Piece(rank=0, name="t", index=((0, 3), (0, width))), "w", (4, 7, *columns))
    seen = {Holdings([part], {"t": tensor}, dtype).digests()[0]}
    for row in range(3):
        for col in range(width):
            for bit in range(size):
                changed = tensor.clone()
                changed.view(bits)[row, col] ^= -(1 << bit) if bit == size - 1 else 1 << bit
                seen.add(Holdings([part], {"t": changed}, dtype).digests()[0])
    assert len(seen) == 1 + 3 * width * size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("cuts", [(0, 3, 8, 11), (0, 4, 8, 11), (0, 1, 2, 11)])
def test_digests_of_columns_add_up_wherever_they_are_cut(dtype: torch.dtype, cuts: tuple[int, ...]) -> None:
    values = torch.randn(5, 11, generator=torch.Generator().manual_seed(7)).to(dtype)
    parts = [digest(values[:, a:b], (0, 5, a, b)) for a, b in pairwise(cuts)]
    assert (sum(parts) - digest(values, (0, 5, 0, 11))) % (1 << 64) == 0
    unaligned = torch.frombuffer(bytearray(b"\0" + values.view(torch.uint8).numpy().tobytes()), dtype=dtype, offset=1)
    assert digest(unaligned.view(5, 11), (0, 5, 0, 11)) == digest(values, (0, 5, 0, 11))


def test_an_expert_axis_joins_the_rows() -> None:
    """Experts that are one tensor have the digest of their rows one below the other."""
    experts = torch.randn(3, 4, 6, requires_grad=True)
    assert tensor_digests({"w": experts}) == tensor_digests({"w": experts.detach().reshape(12, 6)})
