"""Megatron's logits are transformers' logits for every family and every kind of layout (fp32, real Megatron, gloo)."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import ranks as work
import torch
from transformers import AutoModelForCausalLM

from conversion.tiles import ParallelLayout

FAMILIES = ["llama3", "mistral", "qwen3", "qwen3_moe", "qwen3_moe_unnormed"]
TOLERANCE = 1e-4


def packs_of_sequences(number: int) -> list[list[list[int]]]:
    """Ragged sequences; some are longer than the length that the tiny Llama 3 scales its positions from."""
    rng = random.Random(7)
    return [[[rng.randrange(263) for _ in range(length)] for length in (3, 31, 60)] for _ in range(number)]


def expected(folder: Path, packs: list[list[list[int]]]) -> list[Any]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return [torch.cat([model(torch.tensor([ids])).logits[0] for ids in pack]).numpy() for pack in packs]


def assert_logits(ranks: Any, folders: list[Path], layout: ParallelLayout, packs: list[list[list[int]]]) -> None:
    """Every replica's logits, put together over the tensor axis, for every folder."""
    arguments = {"folders": [str(folder) for folder in folders], "layout": layout, "packs": packs}
    found = ranks.run(work.logits, layout.world_size, **arguments)
    for number, folder in enumerate(folders):
        wanted = expected(folder, packs)
        for data in range(layout.data):
            shards = [found[layout.rank(t, layout.pipeline - 1, data)][number] for t in range(layout.tensor)]
            for index in range(len(packs)):
                logits = numpy.concatenate([shard[index] for shard in shards], axis=-1)[:, :263]
                truth = wanted[(index + data) % len(packs)]
                worst = numpy.abs(logits - truth).max()
                assert worst <= TOLERANCE, f"{folder.name}, {layout}, replica {data}, pack {index}: {worst}"
                assert numpy.abs(truth).max() > 1.0  # or the tolerance would say nothing


def test_logits_of_every_family_are_those_of_transformers(ranks: Any, tiny_family: Callable[..., Path]) -> None:
    folders = [tiny_family(family, tie_word_embeddings=tied) for family in FAMILIES for tied in (True, False)]
    assert_logits(ranks, folders, ParallelLayout(), packs_of_sequences(1))


def test_scaled_and_plain_rotary_positions_differ(tiny_family: Callable[..., Path]) -> None:
    """The test above would pass without rope scaling, if these sequences did not feel it."""
    packs = packs_of_sequences(1)
    scaled, plain = (
        expected(folder, packs)[0]
        for folder in (
            tiny_family("llama3"),
            tiny_family("llama3", rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
        )
    )
    assert numpy.abs(scaled - plain).max() > 0.1


def test_experts_on_two_ranks_each_take_the_tokens_of_both(ranks: Any, tiny_family: Callable[..., Path]) -> None:
    folders = [tiny_family(family) for family in ("qwen3_moe", "qwen3_moe_unnormed")]
    assert_logits(ranks, folders, ParallelLayout(data=2, expert=2), packs_of_sequences(2))


def test_two_ranks_share_one_query_group(ranks: Any, tiny_family: Callable[..., Path]) -> None:
    """tensor is larger than num_key_value_heads; the cut of 8 heads of 20 + 2 * 20 rows falls inside a head."""
    folders = [tiny_family("mistral", num_key_value_heads=1, num_attention_heads=8, hidden_size=40, head_dim=10)]
    folders += [tiny_family("qwen3", num_key_value_heads=1, tie_word_embeddings=True)]
    assert_logits(ranks, folders, ParallelLayout(tensor=2, vocabulary_multiple=128), packs_of_sequences(1))


def test_interleaved_stages_hold_the_chunks_the_tiles_say(ranks: Any, tiny_family: Callable[..., Path]) -> None:
    folders = [tiny_family("llama3", num_hidden_layers=8, tie_word_embeddings=tied) for tied in (True, False)]
    assert_logits(ranks, folders, ParallelLayout(pipeline=2, virtual=2), packs_of_sequences(2))


@pytest.mark.slow
def test_experts_tensor_and_pipeline_ranks_together(ranks: Any, tiny_family: Callable[..., Path]) -> None:
    layout = ParallelLayout(tensor=2, pipeline=2, data=2, expert=2)
    assert_logits(ranks, [tiny_family("qwen3_moe")], layout, packs_of_sequences(2))
