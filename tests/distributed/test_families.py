"""Megatron's logits are transformers' logits for every family and every kind of layout (fp32, real Megatron, gloo)."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import ranks as work
import torch
from ranks import Job
from samples import logratio_max
from test_layouts import batch, expected_step, run_gradients
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
    answers = ranks.run(work.logits, layout.world_size, **arguments)
    for number, folder in enumerate(folders):
        wanted = expected(folder, packs)
        for data in range(layout.data):
            of_rank = {layout.coordinates(rank)[:3]: answer for rank, answer in enumerate(answers)}
            shards = [of_rank[t, layout.pipeline - 1, data][number] for t in range(layout.tensor)]
            for index in range(len(packs)):
                logits = numpy.concatenate([shard[index] for shard in shards], axis=-1)[:, :263]
                truth = wanted[(index + data) % len(packs)]
                worst = numpy.abs(logits - truth).max()
                assert worst <= TOLERANCE, f"{folder.name}, {layout}, replica {data}, pack {index}: {worst}"
                assert numpy.abs(truth).max() > 1.0  # or the tolerance would say nothing


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


MOE = ["qwen3_moe", "qwen3_moe_unnormed"]
EIGHT_LAYERS: dict[str, Any] = {"num_hidden_layers": 8}
EIGHT_HEADS: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 4}  # which four ranks divide
LAYOUTS: list[tuple[ParallelLayout, list[str], dict[str, Any]]] = [
    (ParallelLayout(), FAMILIES * 2, {}),
    (ParallelLayout(tensor=2), ["llama3", "qwen3"], {}),
    (ParallelLayout(pipeline=2), ["mistral", "qwen3"], {}),
    (ParallelLayout(pipeline=2, virtual=2), ["llama3"] * 2, EIGHT_LAYERS),
    (ParallelLayout(data=2, expert=2), MOE, {}),
]
RARE_LAYOUTS: list[tuple[ParallelLayout, list[str], dict[str, Any]]] = [
    (ParallelLayout(tensor=2), ["mistral", "qwen3_moe"], EIGHT_HEADS),
    (ParallelLayout(pipeline=2), ["llama3", "qwen3_moe"], EIGHT_HEADS),
    (ParallelLayout(tensor=2, pipeline=2), FAMILIES, EIGHT_HEADS),
    (ParallelLayout(tensor=4), FAMILIES, EIGHT_HEADS),
    (ParallelLayout(tensor=2, pipeline=2, data=2, expert=2), MOE[:1], {}),
]


@pytest.mark.parametrize(
    ("layout", "families", "sizes"),
    [*LAYOUTS, *(pytest.param(*case, marks=pytest.mark.slow) for case in RARE_LAYOUTS)],
)
def test_logits_of_every_family_are_those_of_transformers(
    layout: ParallelLayout, families: list[str], sizes: dict[str, Any], ranks: Any, tiny_family: Callable[..., Path]
) -> None:
    """Of every other one with a tied head: two of a family differ in that."""
    folders = [
        tiny_family(family, tie_word_embeddings=number % 2 == 1, **sizes) for number, family in enumerate(families)
    ]
    assert_logits(ranks, folders, layout, packs_of_sequences(2))


def test_more_tensor_ranks_than_query_groups_share_them(ranks: Any, tiny_family: Callable[..., Path]) -> None:
    """Four heads and one group of keys and values on four ranks: each holds the rows of one and a half heads."""
    folders = [
        tiny_family("mistral", num_attention_heads=4, num_key_value_heads=1),
        tiny_family("qwen3", num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True),
    ]
    assert_logits(ranks, folders, ParallelLayout(tensor=4, vocabulary_multiple=128), packs_of_sequences(1))


def unfused(gradients: dict[str, Any]) -> dict[str, Any]:
    """By the names of files: transformers fuses experts in memory."""
    by_file = {}
    for name, gradient in gradients.items():
        place, _, kind = name.partition(".experts.")
        for expert in range(len(gradient) if kind else 0):
            halves = gradient[expert].chunk(2) if kind == "gate_up_proj" else (gradient[expert],)
            for part, half in zip(("gate", "up") if len(halves) == 2 else ("down",), halves, strict=True):
                by_file[f"{place}.experts.{expert}.{part}_proj.weight"] = half
        if not kind:
            by_file[name] = gradient
    return by_file


@pytest.mark.parametrize("family", ["qwen3_moe", "llama3"])
def test_gradients_are_those_of_transformers(
    family: str, ranks: Any, tiny_family: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_family(family, tie_word_embeddings=family == "llama3")
    data = batch(2)
    loss, gradients = expected_step(folder, data)
    wanted = unfused(gradients)
    for name, job in {"one": Job(str(folder)), "stages": Job(str(folder), pipeline=2)}.items():
        computed, stats = run_gradients(ranks, tmp_path, job, data, name)
        assert stats.loss == pytest.approx(loss, abs=1e-6)
        assert logratio_max(stats) == 0.0
        assert set(computed) == set(wanted)
        for key, gradient in wanted.items():
            worst = (computed[key] - gradient).abs().max().item()
            assert worst <= 1e-5 + 1e-4 * gradient.abs().max().item(), f"{name}, {key}: {worst}"
