"""The families' tables: shapes, tilings, what Megatron is told, and what is refused."""

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_models import (
    FAMILIES,
    LLAMA3,
    config,
    fits,
    layouts,
    models,
    random_weights,
    reference_world,
    vllm_world,
)
from torch import Tensor

from conversion.families import Model, RopeScaling, UnsupportedModelError, model_from_config, read_model
from conversion.megatron import check_tensors
from conversion.tiles import ParallelLayout


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_transformers(family: str, tied: bool, tmp_path: Path) -> None:
    """As transformers writes them: in memory it fuses experts."""
    from transformers import AutoConfig, AutoModelForCausalLM

    small = config(family, tie_word_embeddings=tied)
    (tmp_path / "config.json").write_text(json.dumps(small))
    hf = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    hf.save_pretrained(tmp_path)  # what transformers itself writes is understood
    model = read_model(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in written.items()} == model.parameters()
    assert model.num_parameters() == hf.num_parameters()
    assert model.tied == tied


@given(model=models(), layout=layouts(), engine=st.sampled_from([1, 2, 4, 8]))
@settings(max_examples=40, deadline=None)
def test_tiles_cover_every_local_tensor_once_except_vocabulary_padding(
    model: Model, layout: ParallelLayout, engine: int
) -> None:
    worlds = [(model.vllm_tiles(engine), {r: model.vllm_shapes(engine, r) for r in range(engine)})]
    if fits(model, layout):
        shapes = {r: model.megatron_shapes(layout, r) for r in range(layout.world_size)}
        worlds.append((model.megatron_tiles(layout), shapes))
    for tiles, shapes in worlds:
        covered: dict[tuple[int, str], Tensor] = {
            (rank, name): torch.zeros(shape) for rank, tensors in shapes.items() for name, shape in tensors.items()
        }
        for tile in tiles:
            height = tile.rows[1] - tile.rows[0]
            local = covered[tile.rank, tile.name]
            place = (local if tile.plane is None else local[tile.plane])[tile.row0 : tile.row0 + height]
            if tile.cols is not None:
                place = place[:, tile.col0 : tile.col0 + tile.cols[1] - tile.cols[0]]
            assert place.numel() == height * (1 if tile.cols is None else tile.cols[1] - tile.cols[0])
            place += 1
        padding: dict[str, int] = defaultdict(int)
        for (_, name), count in covered.items():
            assert count.max() <= 1, name
            padding[name] += int((count == 0).sum())
        for name, uncovered in padding.items():
            assert uncovered == 0 or "embed" in name or "lm_head" in name or "output_layer" in name, name


@given(model=models(), tensor=st.sampled_from([1, 2, 4, 8]))
@settings(max_examples=25, deadline=None)
def test_vllm_vocabulary_is_padded_to_64_and_then_split(model: Model, tensor: int) -> None:
    weights = random_weights(model)
    world = reference_world(model.vllm_tiles(tensor), weights, vllm_world(model, tensor))
    whole = torch.cat([world[rank]["model.embed_tokens.weight"] for rank in range(tensor)])
    assert whole.shape[0] == math.ceil(model.vocab_size / 64) * 64
    assert torch.equal(whole[: model.vocab_size], weights["model.embed_tokens.weight"])
    assert whole[model.vocab_size :].isnan().all()


def test_key_value_heads_are_replicated_on_neighbouring_engine_workers() -> None:
    model = model_from_config(config(num_key_value_heads=2))
    weights = random_weights(model)
    world = reference_world(model.vllm_tiles(4), weights, vllm_world(model, 4))
    D = model.dims.head_dim
    k = weights["model.layers.1.self_attn.k_proj.weight"]
    for rank, head in enumerate([0, 0, 1, 1]):
        key_rows = world[rank]["model.layers.1.self_attn.qkv_proj.weight"][D : 2 * D]
        assert torch.equal(key_rows, k[head * D : (head + 1) * D])


def test_a_fused_tensor_of_experts_holds_each_expert_in_a_plane() -> None:
    model = model_from_config(config("qwen3_moe"))
    weights = random_weights(model)
    world = reference_world(model.vllm_tiles(2), weights, vllm_world(model, 2))
    experts = [f"model.layers.1.mlp.experts.{e}" for e in range(6)]
    halves = [torch.stack([weights[f"{name}.{part}_proj.weight"] for name in experts]) for part in ("gate", "up")]
    down = torch.stack([weights[f"{name}.down_proj.weight"] for name in experts])
    for rank in range(2):
        w13 = torch.cat([half.chunk(2, dim=1)[rank] for half in halves], dim=1)
        local = world[rank]
        assert torch.equal(local["model.layers.1.mlp.experts.routed_experts.w13_weight"], w13)
        w2 = down.chunk(2, dim=2)[rank]
        assert torch.equal(local["model.layers.1.mlp.experts.routed_experts.w2_weight"], w2)


def test_fused_norms_have_transformer_engine_names() -> None:
    names = model_from_config(config()).megatron_shapes(ParallelLayout(fused_norms=True), 0)
    assert "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight" in names
    assert "decoder.layers.1.mlp.linear_fc1.layer_norm_weight" in names
    assert "decoder.final_layernorm.weight" in names
    assert not any(name.endswith(("input_layernorm.weight", "pre_mlp_layernorm.weight")) for name in names)


@pytest.mark.parametrize(
    ("rope", "theta"),
    [({}, 10000), ({"rope_theta": 500000.0}, 500000), ({"rope_parameters": {"rope_theta": 2e5}}, 200000)],
)
def test_rope_theta_is_found_in_old_and_new_configurations(rope: dict[str, Any], theta: int) -> None:
    assert model_from_config(config(**rope)).gpt_options()["rotary_base"] == theta


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_llama_3_rope_scaling_is_found_in_old_and_new_configurations(key: str) -> None:
    rope: dict[str, Any] = LLAMA3 | {"original_max_position_embeddings": 8192}
    changes = {key: rope} if key == "rope_parameters" else {"rope_theta": rope.pop("rope_theta"), key: rope}
    model = model_from_config(config("llama", **changes))
    assert model.gpt_options()["rotary_base"] == 10000
    assert model.rope_scaling() == RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )
    assert model_from_config(config()).rope_scaling() is None


REFUSED = [
    ("llama", {"architectures": ["OPTForCausalLM"], "model_type": "opt"}, "known are LlamaForCausalLM, MistralFor"),
    (
        "llama",
        {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"},
        "no norm after attention .* neither cap",
    ),
    ("llama", {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}, "alternate sliding-window layers"),
    (
        "llama",
        {"architectures": ["Gemma3ForConditionalGeneration"]},
        "megatron-core 0.19's local layers cannot hold it",
    ),
    ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    ("llama", {"model_type": "qwen2"}, "model_type='qwen2'"),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor=None, expected a number"),
    ("llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": True}}, "embeddings=True"),
    (
        "llama",
        {"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0, "original_max_position_embeddings": 9}},
        "below high",
    ),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn'"),
    ("qwen3", {"rope_parameters": LLAMA3}, "rope_type='llama3' is not modelled, only 'default'"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'"),
    ("llama", {"rope_parameters": {"rope_theta": 1e4, "mscale": 2.0}}, "mscale"),
    ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ("llama", {"attention_bias": True}, "attention_bias=True"),
    ("llama", {"mlp_bias": True}, "mlp_bias=True"),
    ("llama", {"rope_interleaved": True}, "rope_interleaved=True"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("llama", {"residual_multiplier": 0.5}, "residual_multiplier=0.5"),
    ("llama", {"num_key_value_heads": 3}, "num_key_value_heads=3"),
    ("llama", {"hidden_size": 50}, "hidden_size=50"),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window=True"),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ("qwen2", {"layer_types": ["full_attention"] * 3}, "layer_types has 3 entries, expected .*num_hidden_layers=2"),
    ("qwen2", {"layer_types": []}, "layer_types has 0 entries"),
    ("qwen2", {"num_key_value_heads": None}, "num_key_value_heads is missing"),
    ("qwen2", {"head_dim": 16}, "head_dim=16"),
    ("qwen2", {"head_dim": None}, "head_dim=None"),
    ("llama", {"head_dim": 5}, "head_dim=5 is odd"),
    ("llama", {"hidden_size": 36}, "hidden_size / num_attention_heads = 9 is odd"),
    ("qwen3_moe", {"head_dim": 5}, "head_dim=5 is odd"),
    ("mistral", {"sliding_window": 4096}, "sliding_window=4096"),
    ("mistral", {"num_key_value_heads": None}, "num_key_value_heads is missing"),
    ("qwen3", {"head_dim": None}, "head_dim is missing"),
    ("qwen3", {"attention_bias": True}, "attention_bias=True"),
    ("qwen3", {"num_experts": 8}, "num_experts=8"),
    ("qwen3_moe", {"num_experts": None}, "num_experts is missing"),
    ("qwen3_moe", {"num_local_experts": 8}, "num_local_experts=8 contradicts num_experts=6"),
    ("qwen3_moe", {"num_experts_per_tok": 7}, "num_experts_per_tok=7 is more than num_experts=6"),
    ("qwen3_moe", {"norm_topk_prob": None}, "norm_topk_prob"),
    ("qwen3_moe", {"num_experts_per_tok": 1}, "norm_topk_prob=True with num_experts_per_tok=1"),
    ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
    ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers"),
    ("qwen3_moe", {"shared_expert_intermediate_size": 32}, "shared_expert_intermediate_size=32"),
]


def test_a_window_that_transformers_would_assume_is_refused() -> None:
    silent = {key: value for key, value in config("mistral").items() if key != "sliding_window"}
    with pytest.raises(UnsupportedModelError, match="sliding_window is missing, and its default is not modelled"):
        model_from_config(silent)


@pytest.mark.parametrize(("family", "changes", "message"), REFUSED)
def test_what_is_not_modelled_is_refused_by_name(family: str, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        model_from_config(config(family, **changes))


THREE_GROUPS: dict[str, Any] = {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 72}
SIX_GROUPS: dict[str, Any] = {"num_attention_heads": 24, "num_key_value_heads": 6}


@pytest.mark.parametrize(
    ("sizes", "layout", "words"),
    [
        ({}, {"pipeline": 4}, r"num_hidden_layers=2 does not divide by pipeline=4; .* by 1, 2$"),
        ({}, {"pipeline": 2, "virtual": 2}, r"num_hidden_layers=2 .* by pipeline \* virtual=4"),
        ({}, {"virtual": 2}, "virtual=2 needs pipeline > 1"),
        ({}, {"data": 3, "expert": 2}, "data=3 does not divide by expert=2"),
        ({}, {"data": 2, "expert": 2}, "expert=2: LlamaForCausalLM has no experts"),
        ({}, {"tensor": 3}, "num_key_value_heads=2 .* by tensor=3.* these do: 1, 2, 4$"),
        (THREE_GROUPS, {"tensor": 2}, "num_key_value_heads=3 does not divide by tensor=2"),
        (THREE_GROUPS, {"tensor": 9}, "num_attention_heads=6 does not divide by tensor=9"),
        (
            {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 2},
            {"tensor": 8},
            "rows of query, key and value=20 .* tensor=8",
        ),
        ({"family": "qwen3_moe"}, {"data": 4, "expert": 4}, "num_experts=6 .* by expert=4; .* by 1, 2, 3, 6$"),
        (THREE_GROUPS, {"workers": 4}, "num_attention_heads=6 does not divide by tensor=4"),
        (SIX_GROUPS, {"workers": 4}, "heads=6 does not divide by tensor=4, .*vLLM.* 1, 2, 3, 6, 12, 24$"),
        (SIX_GROUPS, {"workers": 8}, "heads=6 does not divide by tensor=8, .*vLLM.* 1, 2, 3, 6, 12, 24$"),
        (
            {"family": "qwen3_moe", "num_attention_heads": 16, "num_key_value_heads": 16},
            {"workers": 16},
            "moe_intermediate_size=40 does not divide by tensor=16",
        ),
    ],
)
def test_sizes_that_do_not_divide_are_named(sizes: dict[str, Any], layout: dict[str, Any], words: str) -> None:
    """`workers` are those of an engine."""
    model = model_from_config(config(**sizes))
    with pytest.raises(ValueError, match=words):
        model.vllm_tiles(layout["workers"]) if "workers" in layout else model.megatron_tiles(ParallelLayout(**layout))
    assert model_from_config(config(**THREE_GROUPS)).megatron_tiles(ParallelLayout(tensor=6))  # half a group each


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        read_model(tmp_path)


def test_the_first_wrong_megatron_tensor_is_named() -> None:
    model, layout = model_from_config(config()), ParallelLayout()
    tensors = {name: torch.empty(shape) for name, shape in model.megatron_shapes(layout, 0).items()}
    check_tensors(model, layout, 0, tensors)
    with pytest.raises(ValueError, match=r"bias on rank 0 .* expected no such tensor, got \(3,\)"):
        check_tensors(model, layout, 0, tensors | {"decoder.layers.0.mlp.linear_fc1.bias": torch.empty(3)})
    with pytest.raises(ValueError, match=r"embedding.* expected \(131, 48\), got \(136, 48\)"):
        check_tensors(model, layout, 0, tensors | {"embedding.word_embeddings.weight": torch.empty(136, 48)})
