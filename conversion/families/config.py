"""What of an HF config.json is modelled, what is harmless, and the refusal, by name, of everything else.

A key of a configuration that nobody reads is how a model trains slightly wrong. So each family lists what it models
and what has no effect on the weights or the forward pass; any other key, and any value it doesn't model, is refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from conversion.families import fields
from conversion.families.fields import UnsupportedModelError
from conversion.families.rows import Dimensions, Row

_EXPERTS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_REQUIRED = (*_SIZES, "max_position_embeddings", "rms_norm_eps")
_COUNTS = (*_SIZES, "max_position_embeddings", "num_key_value_heads", "head_dim", *_EXPERTS)
_OPTIONAL = ("num_key_value_heads", "head_dim", "tie_word_embeddings")
_NULLABLE = ("num_key_value_heads", "head_dim")  # null is transformers' default, which `dimensions` gives
# Layers times what lies in each: twenty times the largest models'. A damaged number would be listed for hours.
_MOST_PARTS = 1_000_000
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
    "tie_encoder_decoder": (False,),
    "cross_attention_hidden_size": (None,),
}
# Settings of generation that old versions of transformers wrote there: the pinned one drops them, whatever they say.
GENERATION = (
    *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty"),
    *("temperature", "top_k", "top_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty"),
    *("length_penalty", "exponential_decay_length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
    *("encoder_repetition_penalty", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens"),
    *("forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values", "num_return_sequences"),
    *("output_scores", "return_dict_in_generate"),
)
_HARMLESS = frozenset(
    {
        # names and bookkeeping
        *("architectures", "model_type", "transformers_version", "_name_or_path", "_model_name_or_path"),
        *("_commit_hash", "unsloth_fixed", "unsloth_version", "transformers.js_config"),
        *("problem_type", "id2label", "label2id", "num_labels", "finetuning_task", "task_specific_params"),
        # how weights are stored, initialised or run; not what they compute
        *("dtype", "torch_dtype", "initializer_range", "use_cache", "attention_dropout", "torchscript"),
        *("_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "use_bfloat16"),
        *("output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward", "tf_legacy_loss"),
        # the tokenizer's
        *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "cls_token_id"),
        *("mask_token_id", "decoder_start_token_id", "tokenizer_class", "prefix"),
        *GENERATION,
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
    `explicit`: keys that must be there, for transformers' default is not the value we model. `harmless`: keys that
    change nothing, beside those of every family; `layer_types` once it is checked. `head_dim`: may be given, must be
    given (transformers' default has nothing to do with the hidden size), or must be hidden_size / num_attention_heads
    (vLLM does not read it).
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
                raise self._unsupported(
                    f"{key}={value!r} is not modelled: remove the key if what the model computes does not depend on it"
                )
            if key in only and not fields.is_one_of(value, only[key]):
                raise self._unsupported(f"{key}={value!r} is not modelled, only {_listed(only[key])}")
        for key in required:
            if config.get(key) is None:
                raise self._unsupported(f"{key} is missing")
        for key in self.explicit:
            if key not in config:
                raise self._unsupported(f"{key} is missing, and its default is not modelled, only {_listed(only[key])}")
        try:
            self._check_types(config)
        except UnsupportedModelError as error:
            raise self._unsupported(str(error)) from None
        self.rope(config)

    def _check_types(self, config: Mapping[str, Any]) -> None:
        for key in _COUNTS:
            if key in config and not (key in _NULLABLE and config[key] is None):
                fields.count(config, key)
        fields.number(config, "rms_norm_eps")
        fields.flag(config, "tie_word_embeddings")
        if set(kinds := fields.names(config, "layer_types")) - {"full_attention"}:
            raise UnsupportedModelError(f"layer_types={config['layer_types']!r} is not modelled, only 'full_attention'")
        pad: Any = config.get("pad_token_id")
        if pad is not None and (type(pad) is not int or not -config["vocab_size"] <= pad < config["vocab_size"]):
            raise UnsupportedModelError(
                f"pad_token_id={pad!r:.200}, expected null or a token below vocab_size={config['vocab_size']}, without "
                "which transformers does not open the folder"
            )
        layers = config["num_hidden_layers"]
        if config.get("layer_types") is not None and len(kinds) != layers:
            raise UnsupportedModelError(
                f"layer_types has {len(kinds)} entries, expected one a layer: num_hidden_layers={layers}"
            )

    def dimensions(self, config: Mapping[str, Any]) -> Dimensions:
        """The sizes `config` gives."""
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        kv_heads = config.get("num_key_value_heads") or heads
        if heads % kv_heads:
            raise self._unsupported(f"num_attention_heads={heads} does not divide by num_key_value_heads={kv_heads}")
        experts, chosen, width = (config[key] if self.experts else 0 for key in _EXPERTS)
        if chosen > experts:
            raise self._unsupported(f"num_experts_per_tok={chosen} is more than num_experts={experts}")
        for key, parts in {"num_attention_heads": heads, "num_experts": experts}.items():
            if config["num_hidden_layers"] * max(1, parts) > _MOST_PARTS:
                raise self._unsupported(
                    f"num_hidden_layers={config['num_hidden_layers']} times {key}={parts} is more than {_MOST_PARTS}, "
                    "which no model has: is the file damaged?"
                )
        return Dimensions(
            num_layers=config["num_hidden_layers"],
            hidden_size=hidden,
            intermediate_size=config["intermediate_size"],
            vocab_size=config["vocab_size"],
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=self._head_dim(config, hidden, heads),
            tied=fields.flag(config, "tie_word_embeddings"),
            num_experts=experts,
            experts_per_token=chosen,
            moe_intermediate_size=width,
        )

    def _head_dim(self, config: Mapping[str, Any], hidden: int, heads: int) -> int:
        given = config.get("head_dim")
        if self.head_dim == "given" and given is None:
            raise self._unsupported("head_dim is missing")
        if self.head_dim != "given" and hidden % heads:
            raise self._unsupported(f"hidden_size={hidden} does not divide by num_attention_heads={heads}")
        if self.head_dim == "quotient" and config.get("head_dim", hidden // heads) != hidden // heads:
            # transformers would follow the key, null too; vLLM does not read it
            raise self._unsupported(f"head_dim={given} is not modelled, only hidden_size / num_attention_heads")
        size = given or hidden // heads
        if size % 2:
            name = f"hidden_size / num_attention_heads = {size}" if given is None else f"head_dim={size}"
            raise self._unsupported(f"{name} is odd: rotary embeddings turn the numbers of a head in pairs")
        return size

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
        try:
            given = {key: fields.settings(config, key) for key in ("rope_scaling", "rope_parameters")}
            ropes = {self._rope(config, rope, f"{key}: ") for key, rope in given.items() if rope}
            if len(ropes) > 1:  # transformers would read rope_scaling alone
                raise UnsupportedModelError(f"{_listed(given)} contradict each other: {_listed(given.values())}")
            return ropes.pop() if ropes else self._rope(config, {}, "")
        except UnsupportedModelError as error:
            raise self._unsupported(str(error)) from None

    def _rope(self, config: Mapping[str, Any], rope: dict[str, Any], where: str) -> Rope:
        kinds = [rope[key] for key in ("rope_type", "type") if key in rope] or ["default"]
        for kind in kinds:
            if kind != kinds[0] or kind not in self.rope_types:
                types = _listed(self.rope_types)
                raise UnsupportedModelError(f"{where}rope_type={_listed(kinds)} is not modelled, only {types}")
        thetas = [fields.number(config, "rope_theta")] if "rope_theta" in config else []
        thetas += [fields.number(rope, "rope_theta", where)] if "rope_theta" in rope else []
        if len(set(thetas)) == 2:
            raise UnsupportedModelError(f"rope_theta={thetas[0]} contradicts {where}rope_theta={thetas[1]}")
        if not fields.is_one_of(rope.get("partial_rotary_factor", 1.0), (1.0,)):
            raise UnsupportedModelError(f"{where}partial_rotary_factor is not modelled")
        scaling = _llama3(rope, where) if kinds[0] == "llama3" else None
        read = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *(_LLAMA3 if scaling else ())}
        if unread := sorted(rope.keys() - read):
            raise UnsupportedModelError(f"{where}{_listed(unread)} is not modelled with rope_type={kinds[0]!r}")
        return Rope(theta=thetas[0] if thetas else _ROPE_THETA, scaling=scaling)

    def _unsupported(self, problem: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self.architecture}: {problem}")


def _listed(values: Any) -> str:
    return ", ".join(repr(value) for value in values)


def _llama3(rope: Mapping[str, Any], where: str) -> RopeScaling:
    factor, low, high = (fields.number(rope, name, where) for name in _LLAMA3[:3])
    if low >= high:
        raise UnsupportedModelError(f"{where}low_freq_factor={low} must be below high_freq_factor={high}")
    original = fields.count(rope, _LLAMA3[3], where)
    return RopeScaling(
        factor=factor, low_freq_factor=low, high_freq_factor=high, original_max_position_embeddings=original
    )
