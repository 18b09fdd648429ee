"""What of an HF config.json is modelled, what is harmless, and the refusal, by name, of everything else.

A key of a configuration that nobody reads is how a model trains slightly wrong. So each family lists what it models
and what has no effect on the weights or the forward pass; any other key, and any value it doesn't model, is refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from conversion.families.rows import Dimensions, Row


class UnsupportedModelError(ValueError):
    """A configuration says something that is not modelled; the message names the key, its value and what is known."""


_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_REQUIRED = (*_SIZES, "max_position_embeddings", "rms_norm_eps")
_COUNTS = (*_SIZES, "max_position_embeddings", "num_key_value_heads", "head_dim")
_OPTIONAL = ("num_key_value_heads", "head_dim", "tie_word_embeddings")
_ROPE = ("rope_theta", "rope_parameters", "rope_scaling")
_ROPE_THETA = 10000.0  # transformers' default for both families
# Keys that change something we do not model, unless they hold one of these values.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "quantization_config": (None,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "is_decoder": (False,),
    "pruned_heads": (None, {}),
    "partial_rotary_factor": (1.0,),
}
_HARMLESS = frozenset(
    {
        # names and bookkeeping
        *("architectures", "model_type", "transformers_version", "_name_or_path", "_model_name_or_path"),
        *("_commit_hash", "unsloth_fixed", "unsloth_version", "transformers.js_config"),
        *("problem_type", "id2label", "label2id"),
        # how weights are stored, initialised or run; not what they compute
        *("dtype", "torch_dtype", "initializer_range", "use_cache", "attention_dropout", "torchscript"),
        *("_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "use_bfloat16"),
        *("output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward", "tf_legacy_loss"),
        # the tokenizer's
        *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "cls_token_id"),
        *("mask_token_id", "decoder_start_token_id"),
        "layer_types",  # checked below
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One architecture: its table of rows, and what its configuration may say."""

    architecture: str
    model_type: str
    rows: tuple[Row, ...]
    add_qkv_bias: bool
    required: tuple[str, ...] = ()
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    harmless: frozenset[str] = frozenset()

    def check(self, config: Mapping[str, Any]) -> None:
        """Raises UnsupportedModelError for the first thing in `config` that this family does not model."""
        only = {**_ONLY, **self.only}
        known = _HARMLESS | self.harmless | only.keys() | {*_REQUIRED, *_OPTIONAL, *_ROPE}
        for key, value in config.items():
            if key not in known:
                raise self._unsupported(f"{key}={value!r} is not modelled")
            if key in only and value not in only[key]:
                raise self._unsupported(f"{key}={value!r} is not modelled, only {_listed(only[key])}")
        for key in (*_REQUIRED, *self.required):
            if config.get(key) is None:
                raise self._unsupported(f"{key} is missing")
        for key in _COUNTS:
            value = config.get(key)
            if value is not None and (type(value) is not int or value < 1):
                raise self._unsupported(f"{key}={value!r}: expected a whole number of at least 1")
        if set(config.get("layer_types") or ()) - {"full_attention"}:
            raise self._unsupported(f"layer_types={config['layer_types']!r} is not modelled, only 'full_attention'")
        self.rope_theta(config)

    def dimensions(self, config: Mapping[str, Any]) -> Dimensions:
        """The sizes `config` gives."""
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        kv_heads = config.get("num_key_value_heads") or heads
        if hidden % heads:
            raise self._unsupported(f"hidden_size={hidden} does not divide by num_attention_heads={heads}")
        if heads % kv_heads:
            raise self._unsupported(f"num_attention_heads={heads} does not divide by num_key_value_heads={kv_heads}")
        head_dim = config.get("head_dim") or hidden // heads
        if self.model_type == "qwen2" and head_dim != hidden // heads:
            # transformers would follow the key, vLLM's Qwen2 does not read it
            raise self._unsupported(f"head_dim={head_dim} is not modelled, only hidden_size / num_attention_heads")
        return Dimensions(
            num_layers=config["num_hidden_layers"],
            hidden_size=hidden,
            intermediate_size=config["intermediate_size"],
            vocab_size=config["vocab_size"],
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            tied=bool(config.get("tie_word_embeddings", False)),
        )

    def rope_theta(self, config: Mapping[str, Any]) -> float:
        """The base of the rotary embedding, from `rope_parameters` (transformers 5) or the older top-level key."""
        theta = config.get("rope_theta")
        for key in ("rope_parameters", "rope_scaling"):
            rope = dict(config.get(key) or {})
            kind = rope.pop("rope_type", rope.pop("type", "default"))
            rope.pop("type", None)
            theta = rope.pop("rope_theta", theta)
            if kind != "default":
                raise self._unsupported(f"{key}: rope_type={kind!r} is not modelled, only 'default'")
            if rope.pop("partial_rotary_factor", 1.0) != 1.0:
                raise self._unsupported(f"{key}: partial_rotary_factor is not modelled")
            if rope:
                raise self._unsupported(f"{key}: {_listed(sorted(rope))} is not modelled")
        return float(_ROPE_THETA if theta is None else theta)

    def _unsupported(self, what: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self.architecture}: {what}")


def _listed(values: Any) -> str:
    return ", ".join(repr(value) for value in values)
