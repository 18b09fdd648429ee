"""What of an HF config.json is modelled, what is harmless, and the refusal, by name, of everything else.

A key of a configuration that nobody reads is how a model trains slightly wrong. So each family lists what it models
and what has no effect on the weights or the forward pass; any other key, and any value it doesn't model, is refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from conversion.families.rows import Dimensions, Row


class UnsupportedModelError(ValueError):
    """A configuration says something that is not modelled; the message names the key, its value and what is known."""


_EXPERTS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_REQUIRED = (*_SIZES, "max_position_embeddings", "rms_norm_eps")
_COUNTS = (*_SIZES, "max_position_embeddings", "num_key_value_heads", "head_dim", *_EXPERTS)
_OPTIONAL = ("num_key_value_heads", "head_dim", "tie_word_embeddings")
_ROPE = ("rope_theta", "rope_parameters", "rope_scaling")
_ROPE_THETA = 10000.0  # transformers' default for every family here
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
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
class RopeScaling:
    """Llama 3's stretching of the rotary frequencies, by transformers' names.

    Wavelengths (in tokens) above original / low are divided by `factor`, those below original / high are left, and
    between the two it goes over smoothly.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """The rotary embedding a configuration asks for."""

    theta: float
    scaling: RopeScaling | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One architecture: its table of rows, and what its configuration may say.

    `transformer`: what its Megatron TransformerConfig has beside the sizes. `required`: keys that must hold a value;
    `explicit`: keys that must be there, for transformers' default is not the value we model. `head_dim`: may be given,
    must be given (transformers' default has nothing to do with the hidden size), or must be hidden_size /
    num_attention_heads (vLLM does not read it).
    """

    architecture: str
    model_type: str
    rows: tuple[Row, ...]
    transformer: Mapping[str, Any] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    explicit: tuple[str, ...] = ()
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    harmless: frozenset[str] = frozenset()
    head_dim: Literal["given or quotient", "given", "quotient"] = "given or quotient"
    rope_types: tuple[str, ...] = ("default",)
    experts: bool = False
    aliases: Mapping[str, str] = field(default_factory=dict)

    def renamed(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """`config` with its aliases under the names used here; transformers writes some keys by another name."""
        renamed = {key: value for key, value in config.items() if key not in self.aliases}
        for alias, key in self.aliases.items():
            if alias in config and renamed.setdefault(key, config[alias]) != config[alias]:
                raise self._unsupported(f"{alias}={config[alias]!r} contradicts {key}={renamed[key]!r}")
        return renamed

    def check(self, config: Mapping[str, Any]) -> None:
        """Raises UnsupportedModelError for the first thing in `config` that this family does not model."""
        only = {**_ONLY, **self.only}
        required = (*_REQUIRED, *self.required)
        known = _HARMLESS | self.harmless | only.keys() | {*required, *self.explicit, *_OPTIONAL, *_ROPE}
        for key, value in config.items():
            if key not in known:
                raise self._unsupported(f"{key}={value!r} is not modelled")
            if key in only and value not in only[key]:
                raise self._unsupported(f"{key}={value!r} is not modelled, only {_listed(only[key])}")
        for key in required:
            if config.get(key) is None:
                raise self._unsupported(f"{key} is missing")
        for key in self.explicit:
            if key not in config:
                raise self._unsupported(f"{key} is missing, and its default is not modelled, only {_listed(only[key])}")
        for key in _COUNTS:
            value = config.get(key)
            if value is not None and (type(value) is not int or value < 1):
                raise self._unsupported(f"{key}={value!r}: expected a whole number of at least 1")
        if (tied := config.get("tie_word_embeddings")) is not None and type(tied) is not bool:
            raise self._unsupported(f"tie_word_embeddings={tied!r}: expected true or false")
        if set(config.get("layer_types") or ()) - {"full_attention"}:
            raise self._unsupported(f"layer_types={config['layer_types']!r} is not modelled, only 'full_attention'")
        self.rope(config)

    def dimensions(self, config: Mapping[str, Any]) -> Dimensions:
        """The sizes `config` gives."""
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        kv_heads = config.get("num_key_value_heads") or heads
        if heads % kv_heads:
            raise self._unsupported(f"num_attention_heads={heads} does not divide by num_key_value_heads={kv_heads}")
        experts, chosen, width = (config[key] if self.experts else 0 for key in _EXPERTS)
        if chosen > experts:
            raise self._unsupported(f"num_experts_per_tok={chosen} is more than num_experts={experts}")
        return Dimensions(
            num_layers=config["num_hidden_layers"],
            hidden_size=hidden,
            intermediate_size=config["intermediate_size"],
            vocab_size=config["vocab_size"],
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=self._head_dim(config, hidden, heads),
            tied=bool(config.get("tie_word_embeddings", False)),
            num_experts=experts,
            experts_per_token=chosen,
            moe_intermediate_size=width,
        )

    def _head_dim(self, config: Mapping[str, Any], hidden: int, heads: int) -> int:
        given = config.get("head_dim")
        if self.head_dim == "given":
            if given is None:
                raise self._unsupported("head_dim is missing")
            return given
        if hidden % heads:
            raise self._unsupported(f"hidden_size={hidden} does not divide by num_attention_heads={heads}")
        if self.head_dim == "quotient" and given not in (None, hidden // heads):
            # transformers would follow the key, vLLM does not read it
            raise self._unsupported(f"head_dim={given} is not modelled, only hidden_size / num_attention_heads")
        return given or hidden // heads

    def transformer_options(self, config: Mapping[str, Any], dims: Dimensions) -> dict[str, Any]:
        """What Megatron's TransformerConfig must hold for this family, beside sizes and what all have in common."""
        if not self.experts:
            return dict(self.transformer)
        normed = config["norm_topk_prob"]
        if normed and dims.experts_per_token == 1:
            raise self._unsupported(
                "norm_topk_prob=True with num_experts_per_tok=1: Megatron's router has no such mode"
            )
        return {
            **self.transformer,
            "num_moe_experts": dims.num_experts,
            "moe_ffn_hidden_size": dims.moe_intermediate_size,
            "moe_router_topk": dims.experts_per_token,
            "moe_router_score_function": "softmax",
            # Softmax over the chosen logits alone is softmax over all, chosen and scaled to a sum of one.
            "moe_router_pre_softmax": not normed,
            "moe_router_dtype": None,  # logits in the compute type, softmax in float32: as transformers
            "moe_router_load_balancing_type": "none",
            "moe_aux_loss_coeff": 0.0,
            "moe_expert_capacity_factor": None,  # no token is dropped
            "moe_grouped_gemm": False,
        }

    def rope(self, config: Mapping[str, Any]) -> Rope:
        """The rotary embedding, from `rope_parameters` (transformers 5) or the older top-level keys."""
        theta, scaling = config.get("rope_theta"), None
        for key in ("rope_parameters", "rope_scaling"):
            rope = dict(config.get(key) or {})
            kind = rope.pop("rope_type", rope.pop("type", "default"))
            rope.pop("type", None)
            theta = rope.pop("rope_theta", theta)
            if kind not in self.rope_types:
                raise self._unsupported(f"{key}: rope_type={kind!r} is not modelled, only {_listed(self.rope_types)}")
            if kind == "llama3":
                if scaling is not None:
                    raise self._unsupported("rope_parameters and rope_scaling both scale")
                scaling = self._llama3(key, {name: rope.pop(name, None) for name in _LLAMA3})
            if rope.pop("partial_rotary_factor", 1.0) != 1.0:
                raise self._unsupported(f"{key}: partial_rotary_factor is not modelled")
            if rope:
                raise self._unsupported(f"{key}: {_listed(sorted(rope))} is not modelled")
        return Rope(theta=float(_ROPE_THETA if theta is None else theta), scaling=scaling)

    def _llama3(self, key: str, values: dict[str, Any]) -> RopeScaling:
        for name, value in values.items():
            if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
                raise self._unsupported(f"{key}: {name}={value!r}, expected a number above 0")
        if values["low_freq_factor"] >= values["high_freq_factor"]:
            raise self._unsupported(f"{key}: low_freq_factor must be below high_freq_factor, got {values}")
        return RopeScaling(**values)

    def _unsupported(self, what: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self.architecture}: {what}")


def _listed(values: Any) -> str:
    return ", ".join(repr(value) for value in values)
