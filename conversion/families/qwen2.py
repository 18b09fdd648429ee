"""Qwen2 and Qwen2.5: Llama's rows and a bias on q, k and v.

https://arxiv.org/abs/2407.10671; HF's name is Qwen2ForCausalLM. Left out: sliding windows, multimodal rope.
"""

from conversion.families import llama
from conversion.families.config import Family
from conversion.families.rows import QKV

QWEN2 = Family(
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    rows=(
        *llama.ROWS,
        QKV(
            hf="model.layers.{i}.self_attn.{part}_proj.bias",
            megatron="decoder.layers.{n}.self_attention.linear_qkv.bias",
            vllm="model.layers.{i}.self_attn.qkv_proj.bias",
            bias=True,
        ),
    ),
    transformer={"add_qkv_bias": True},
    # HF's default for a missing num_key_value_heads is 32 here, whatever the number of heads: never guess it.
    required=("num_key_value_heads",),
    only={"use_sliding_window": (False,), "use_mrope": (False,)},
    # No window while use_sliding_window is false.
    harmless=frozenset({"sliding_window", "max_window_layers", "layer_types"}),
    head_dim="quotient",
)
