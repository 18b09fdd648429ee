"""Qwen3, dense: Llama's rows and a norm over each head of q and k; the head size is a number of its own.

https://arxiv.org/abs/2505.09388; HF's name is Qwen3ForCausalLM. Left out: attention biases, sliding windows.
"""

from conversion.families import llama
from conversion.families.config import Family
from conversion.families.rows import Replicated, Row

HEAD_NORMS: tuple[Row, ...] = (
    Replicated(
        hf="model.layers.{i}.self_attn.q_norm.weight",
        megatron="decoder.layers.{n}.self_attention.q_layernorm.weight",
        sizes=("head_dim",),
    ),
    Replicated(
        hf="model.layers.{i}.self_attn.k_norm.weight",
        megatron="decoder.layers.{n}.self_attention.k_layernorm.weight",
        sizes=("head_dim",),
    ),
)

QWEN3 = Family(
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    rows=(*llama.ROWS, *HEAD_NORMS),
    transformer={"qk_layernorm": True},
    # HF's defaults for missing key-value heads and head size are 32 and 128, whatever the rest says.
    required=("num_key_value_heads",),
    only={"attention_bias": (False,), "use_sliding_window": (False,)},
    # No window while use_sliding_window is false.
    harmless=frozenset({"sliding_window", "max_window_layers", "layer_types"}),
    head_dim="given",
)
