"""A config.json may hold anything anywhere: it is understood, or refused in one message that names the field."""

import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import FAMILIES, LLAMA3, config
from transformers import AutoConfig, AutoModelForCausalLM

from conversion.ends import open_end
from conversion.families import UnsupportedModelError, model_from_config, read_model
from conversion.families.config import GENERATION

ROPE = LLAMA3 | {"original_max_position_embeddings": 24}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
WRONG: list[Any] = [
    *(None, True, False, 0, 1, -1, 3, 10**9, 2**63, 10**400),
    *(0.0, 2.0, -0.5, 1e-5, 1e308, math.nan, math.inf, -math.inf, "", "abc", "1", "default"),
    *([], {}, [1, 2], [["a"]], [None], ["x"], {"a": 1}, {"rope_type": ["llama3"]}, {"rope_theta": {}}),
]


def whole(family: str) -> dict[str, Any]:
    """A configuration with every kind of field."""
    experts = {"num_local_experts": 6, "mlp_only_layers": [], "decoder_sparse_step": 1} if "moe" in family else {}
    scaled = ROPE if family == "llama3" else PLAIN
    kinds = {} if family == "mistral" else {"layer_types": ["full_attention"] * 2}
    more = {"head_dim": 12, "hidden_act": "silu", "rope_theta": 1e4, "pad_token_id": 0}
    return config(family, **(more | {"rope_parameters": scaled, "rope_scaling": None} | experts | kinds))


def assert_understood_or_named(small: dict[str, Any], key: str) -> None:
    """`key` holds what may be anything."""
    try:
        model = model_from_config(small)
    except UnsupportedModelError as error:
        assert key in str(error)
        return
    transformer, options = model.transformer_config(), model.gpt_options()
    for number in (transformer["layernorm_epsilon"], options["rotary_base"], options["max_sequence_length"]):
        assert type(number) in (int, float) and 0 < number < math.inf
    assert all(type(size) is int and size > 0 for shape in model.parameters().values() for size in shape)
    assert type(model.tied) is bool
    model.rope_scaling()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_field_that_holds_something_else_is_named(family: str) -> None:
    good = whole(family)
    assert_understood_or_named(good, "nothing is refused")
    for key in good:
        for value in WRONG:
            assert_understood_or_named(good | {key: value}, key)
    for key in good["rope_parameters"]:
        for value in WRONG:
            changed = good["rope_parameters"] | {key: value}
            assert_understood_or_named(good | {"rope_parameters": changed}, key)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(max_value=9) | st.integers(min_value=10**6) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.sampled_from(list(ROPE)), inner),
    max_leaves=6,
)


@given(data=st.data(), value=JSON)
@settings(max_examples=200, deadline=None)
def test_whatever_a_field_holds_it_is_understood_or_named(data: st.DataObject, value: Any) -> None:
    good = whole(data.draw(st.sampled_from(sorted(FAMILIES))))
    key = data.draw(st.sampled_from(sorted(good)))
    assert_understood_or_named(good | {key: value}, key)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rope_parameters": PLAIN | {"rope_theta": 5e5}, "rope_scaling": ROPE},
            "'rope_scaling', 'rope_parameters' contradict",
        ),
        ({"rope_theta": 1e4, "rope_parameters": PLAIN | {"rope_theta": 5e5}}, "rope_theta=10000.0 contradicts rope_"),
        ({"rope_scaling": ROPE | {"type": "default"}}, "rope_scaling: rope_type='llama3', 'default' is not modelled"),
        ({"rms_norm_eps": -1}, "rms_norm_eps=-1, expected a number above 0"),
        ({"rope_theta": "abc"}, "rope_theta='abc', expected a number above 0"),
        ({"rope_parameters": {"rope_theta": math.nan}}, "rope_parameters: rope_theta=nan, expected a number"),
        ({"num_hidden_layers": 10**9}, r"num_hidden_layers=1000000000 times .*=4 is more than 1000000"),
        ({"num_attention_heads": 10**9, "num_key_value_heads": 10**9, "head_dim": 2}, "times num_attention_heads="),
        ({"vocab_size": 2**41}, "vocab_size=2199023255552, expected a whole number"),
        ({"mlp_bias": 0}, "mlp_bias=0 is not modelled, only False"),
        ({"auto_map": {"AutoConfig": "own.Config"}}, r"auto_map=.*own\.Config.* is not modelled: remove the key if"),
        ({"model_type": None}, 'model_type is missing, .*: add "model_type": "llama"$'),
    ],
)
def test_what_has_no_meaning_or_two_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config("llama", **changes)))
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        read_model(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_configuration_without_its_kind_is_refused_as_by_transformers(family: str, tmp_path: Path) -> None:
    small = config(family)
    kind = small.pop("model_type")
    (tmp_path / "config.json").write_text(json.dumps(small))
    with pytest.raises(UnsupportedModelError, match=f'add "model_type": "{kind}"'):
        read_model(tmp_path)
    with pytest.raises(ValueError, match="model_type"):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_old_versions_wrote_for_generation_is_no_part_of_a_model(family: str, tmp_path: Path) -> None:
    old = config(family, tokenizer_class="LlamaTokenizer", **dict.fromkeys(GENERATION, 0.5))
    assert model_from_config(old).computation() == model_from_config(config(family)).computation()
    (tmp_path / "config.json").write_text(json.dumps(old))
    read = AutoConfig.from_pretrained(tmp_path)
    assert [key for key in GENERATION if hasattr(read, key)] == []


@pytest.mark.parametrize("key", ["attention_bias", "mlp_bias"])
def test_mistral_may_say_that_it_has_no_biases(key: str) -> None:
    plain, without_biases = model_from_config(config("mistral")), model_from_config(config("mistral", **{key: False}))
    assert without_biases.computation() == plain.computation()
    with pytest.raises(UnsupportedModelError, match=f"{key}=True is not modelled, only False"):
        model_from_config(config("mistral", **{key: True}))


@pytest.mark.parametrize("kinds", [None, ["full_attention"] * 2])
def test_what_transformers_opens_as_a_ministral_is_no_mistral(kinds: list[str] | None, tmp_path: Path) -> None:
    small = config("mistral", layer_types=kinds)
    with pytest.raises(UnsupportedModelError, match=r"layer_types=.* is not modelled: remove the key"):
        model_from_config(small)
    (tmp_path / "config.json").write_text(json.dumps(small))
    assert AutoConfig.from_pretrained(tmp_path).model_type == "ministral"


@pytest.mark.parametrize(("token", "is_one"), [(-1, True), (130, True), (131, False), (-132, False)])
def test_a_token_of_padding_is_one_that_transformers_can_embed(token: int, is_one: bool) -> None:
    small: dict[str, Any] = config("llama", pad_token_id=token)
    for build, error in (
        (lambda: model_from_config(small), UnsupportedModelError),
        (lambda: AutoModelForCausalLM.from_config(AutoConfig.for_model(**small)), AssertionError),
    ):
        with nullcontext() if is_one else pytest.raises(error, match=r"pad_token_id=|Padding_idx must be within"):
            build()


def test_the_same_said_twice_is_understood() -> None:
    old = {key: value for key, value in ROPE.items() if key != "rope_theta"} | {"type": "llama3"}
    model = model_from_config(config("llama", rope_theta=1e4, rope_scaling=old, rope_parameters=ROPE))
    assert model.rope_scaling() == model_from_config(config("llama3")).rope_scaling()


@pytest.mark.parametrize("data", [b"\xff\xfe", b"{", b"[" * 100_000, b'{"vocab_size": ' + b"1" * 5000 + b"}", b""])
def test_a_file_that_is_no_json_is_named(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(ValueError, match="is no JSON") as caught:
        read_model(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_a_name_of_the_hub_is_told_from_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"hf download some/model-1\.5B --local-dir runs/models/model-1\.5B, then"):
        read_model("some/model-1.5B")
    with pytest.raises(ValueError, match=r"does not exist: .*/hf download some/model-1\.5B --local-dir runs/models/m"):
        open_end("some/model-1.5B")
    with pytest.raises(ValueError, match=f"{tmp_path}/none does not exist: name a model's folder$"):
        open_end(tmp_path / "none")
    for folder in ("../some-model", "model", "runs/models/model", "/model", str(tmp_path)):
        with pytest.raises(ValueError, match=r"name one that has$"):
            read_model(folder)
