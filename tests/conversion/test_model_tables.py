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
from tiny_models import config, empty_world, models, random_weights, reference_world
from torch import Tensor

from conversion.families import Model, UnsupportedModelError, model_from_config, read_model
from conversion.megatron import check_tensors
from conversion.tiles import ParallelLayout, share

LAYOUTS = [ParallelLayout(tensor=t, pipeline=p) for t in (1, 2, 4) for p in (1, 2, 3)]


def fits(model: Model, layout: ParallelLayout) -> bool:
    return layout.tensor <= model.dims.num_kv_heads and model.num_layers % layout.pipeline == 0


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_transformers(family: str, tied: bool, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    small = config(family, tie_word_embeddings=tied)
    (tmp_path / "config.json").write_text(json.dumps(small))
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    hf.config.save_pretrained(tmp_path)  # what transformers itself writes is understood
    model = read_model(tmp_path)
    assert {name: tuple(p.shape) for name, p in hf.named_parameters()} == model.parameters()
    assert model.num_parameters() == hf.num_parameters()
    assert model.tied == tied


@given(model=models(), layout=st.sampled_from(LAYOUTS), engine=st.sampled_from([1, 2, 4, 8]), fused=st.booleans())
@settings(max_examples=40, deadline=None)
def test_tiles_cover_every_local_tensor_once_except_vocabulary_padding(
    model: Model, layout: ParallelLayout, engine: int, fused: bool
) -> None:
    worlds = [(model.vllm_tiles(engine), {r: model.vllm_shapes(engine, r) for r in range(engine)})]
    if fits(model, layout):
        layout = ParallelLayout(tensor=layout.tensor, pipeline=layout.pipeline, data=2, fused_norms=fused)
        shapes = {r: model.megatron_shapes(layout, r) for r in range(layout.world_size)}
        worlds.append((model.megatron_tiles(layout), shapes))
    for tiles, shapes in worlds:
        covered: dict[tuple[int, str], Tensor] = {
            (rank, name): torch.zeros(shape) for rank, tensors in shapes.items() for name, shape in tensors.items()
        }
        for tile in tiles:
            height = tile.rows[1] - tile.rows[0]
            place = covered[tile.rank, tile.name][tile.row0 : tile.row0 + height]
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


@given(model=models(), tensor=st.sampled_from([1, 2, 4]))
@settings(max_examples=25, deadline=None)
def test_megatron_qkv_is_interleaved_by_query_group(model: Model, tensor: int) -> None:
    if tensor > model.dims.num_kv_heads:
        return
    layout = ParallelLayout(tensor=tensor)
    weights = random_weights(model)
    shapes = {rank: model.megatron_shapes(layout, rank) for rank in range(tensor)}
    world = reference_world(model.megatron_tiles(layout), weights, empty_world(shapes))
    for kind in ("weight", "bias") if model.architecture.startswith("Qwen2") else ("weight",):
        q, k, v = (weights[f"model.layers.0.self_attn.{part}_proj.{kind}"] for part in "qkv")
        groups, rest = model.dims.num_kv_heads, q.shape[1:]
        by_group = [part.view(groups, -1, *rest) for part in (q, k, v)]
        expected = torch.cat(by_group, dim=1).reshape(tensor, -1, *rest)
        for rank in range(tensor):
            assert torch.equal(world[rank][f"decoder.layers.0.self_attention.linear_qkv.{kind}"], expected[rank])


@given(model=models(), tensor=st.sampled_from([1, 2, 4, 8]))
@settings(max_examples=25, deadline=None)
def test_vllm_vocabulary_is_padded_to_64_and_then_split(model: Model, tensor: int) -> None:
    weights = random_weights(model)
    shapes = {rank: model.vllm_shapes(tensor, rank) for rank in range(tensor)}
    world = reference_world(model.vllm_tiles(tensor), weights, empty_world(shapes))
    whole = torch.cat([world[rank]["model.embed_tokens.weight"] for rank in range(tensor)])
    assert whole.shape[0] == math.ceil(model.vocab_size / 64) * 64
    assert torch.equal(whole[: model.vocab_size], weights["model.embed_tokens.weight"])
    assert whole[model.vocab_size :].isnan().all()


def test_key_value_heads_are_replicated_on_neighbouring_engine_workers() -> None:
    model = model_from_config(config(num_key_value_heads=2))
    weights = random_weights(model)
    world = reference_world(
        model.vllm_tiles(4), weights, empty_world({rank: model.vllm_shapes(4, rank) for rank in range(4)})
    )
    D = model.dims.head_dim
    k = weights["model.layers.1.self_attn.k_proj.weight"]
    for rank, head in enumerate([0, 0, 1, 1]):
        held = world[rank]["model.layers.1.self_attn.qkv_proj.weight"][D : 2 * D]
        assert torch.equal(held, k[head * D : (head + 1) * D])


def test_a_tied_head_is_a_second_tile_on_the_last_stage_only() -> None:
    model = model_from_config(config(tie_word_embeddings=True))
    assert "lm_head.weight" not in model.parameters()
    assert "output_layer.weight" not in model.megatron_shapes(ParallelLayout(), 0)
    two = ParallelLayout(pipeline=2)
    heads = [tile for tile in model.megatron_tiles(two) if tile.name == "output_layer.weight"]
    assert [(tile.rank, tile.hf) for tile in heads] == [(1, "model.embed_tokens.weight")]
    assert "lm_head.weight" not in model.vllm_shapes(1, 0)


def test_fused_norms_have_transformer_engine_names() -> None:
    names = model_from_config(config()).megatron_shapes(ParallelLayout(fused_norms=True), 0)
    assert "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight" in names
    assert "decoder.layers.1.mlp.linear_fc1.layer_norm_weight" in names
    assert "decoder.final_layernorm.weight" in names
    assert not any(name.endswith(("input_layernorm.weight", "pre_mlp_layernorm.weight")) for name in names)


def test_rank_order_is_megatrons_default() -> None:
    layout = ParallelLayout(tensor=2, pipeline=3, data=2)
    assert layout.rank(1, 0, 0) == 1
    assert layout.rank(0, 0, 1) == 2
    assert layout.rank(0, 1, 0) == 4
    assert [layout.rank(*layout.coordinates(rank)) for rank in range(12)] == list(range(12))


def test_the_transformer_configuration_says_what_the_hf_configuration_says() -> None:
    model = model_from_config(config("qwen2", rope_parameters={"rope_type": "default", "rope_theta": 1e6}))
    said = model.transformer_config()
    assert said["num_query_groups"] == 2 and said["kv_channels"] == 12 and said["ffn_hidden_size"] == 56
    assert said["add_qkv_bias"] and not said["add_bias_linear"] and said["activation"] == "silu"
    assert model.gpt_options() == {
        "vocab_size": 131,
        "max_sequence_length": 128,
        "share_embeddings_and_output_weights": False,
        "rotary_base": 1000000,
        "rotary_percent": 1.0,
    }
    assert model.padded_vocab_size(4) == 132


@pytest.mark.parametrize(
    ("rope", "theta"),
    [({}, 10000), ({"rope_theta": 500000.0}, 500000), ({"rope_parameters": {"rope_theta": 2e5}}, 200000)],
)
def test_rope_theta_is_found_in_old_and_new_configurations(rope: dict[str, Any], theta: int) -> None:
    assert model_from_config(config(**rope)).gpt_options()["rotary_base"] == theta


REFUSED = [
    ("llama", {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}, "known are LlamaForCausalLM"),
    ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    ("llama", {"model_type": "qwen2"}, "model_type='qwen2'"),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}}, "rope_type='llama3'"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'"),
    ("llama", {"rope_parameters": {"rope_theta": 1e4, "mscale": 2.0}}, "mscale"),
    ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ("llama", {"attention_bias": True}, "attention_bias=True"),
    ("llama", {"mlp_bias": True}, "mlp_bias=True"),
    ("llama", {"rope_interleaved": True}, "rope_interleaved=True"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("llama", {"residual_multiplier": 0.5}, "residual_multiplier=0.5"),
    ("llama", {"rms_norm_eps": None}, "rms_norm_eps is missing"),
    ("llama", {"num_hidden_layers": 0}, "num_hidden_layers=0"),
    ("llama", {"vocab_size": "131"}, "vocab_size='131'"),
    ("llama", {"num_key_value_heads": 3}, "num_key_value_heads=3"),
    ("llama", {"hidden_size": 50}, "hidden_size=50"),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window=True"),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ("qwen2", {"num_key_value_heads": None}, "num_key_value_heads is missing"),
    ("qwen2", {"head_dim": 16}, "head_dim=16"),
]


@pytest.mark.parametrize(("family", "changes", "message"), REFUSED)
def test_what_is_not_modelled_is_refused_by_name(family: str, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        model_from_config(config(family, **changes))


def test_sizes_that_do_not_divide_are_named() -> None:
    model = model_from_config(config(num_attention_heads=6, num_key_value_heads=3, hidden_size=48))
    with pytest.raises(ValueError, match="num_key_value_heads=3 does not divide by tensor=2"):
        model.megatron_tiles(ParallelLayout(tensor=2))
    with pytest.raises(ValueError, match="tensor=6 is larger than num_key_value_heads=3"):
        model.megatron_tiles(ParallelLayout(tensor=6))
    with pytest.raises(ValueError, match="num_hidden_layers=2 does not divide by pipeline=4"):
        model.megatron_tiles(ParallelLayout(pipeline=4))
    with pytest.raises(ValueError, match="num_attention_heads=6 does not divide by tensor=4"):
        model.vllm_tiles(4)
    with pytest.raises(ValueError, match="F=7 does not divide by tp=2"):
        share(7, 2, 0, "F", "tp")


def test_a_folder_without_a_readable_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        read_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="no JSON"):
        read_model(tmp_path)


def test_the_first_wrong_megatron_tensor_is_named() -> None:
    model, layout = model_from_config(config()), ParallelLayout()
    tensors = {name: torch.empty(shape) for name, shape in model.megatron_shapes(layout, 0).items()}
    check_tensors(model, layout, 0, tensors)
    with pytest.raises(ValueError, match=r"bias on rank 0 .* expected no such tensor, got \(3,\)"):
        check_tensors(model, layout, 0, tensors | {"decoder.layers.0.mlp.linear_fc1.bias": torch.empty(3)})
    with pytest.raises(ValueError, match=r"embedding.* expected \(131, 48\), got \(136, 48\)"):
        check_tensors(model, layout, 0, tensors | {"embedding.word_embeddings.weight": torch.empty(136, 48)})
