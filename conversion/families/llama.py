"""Llama (1 to 3.3, SmolLM2, ...): RMSNorm, rotary attention with query groups, SwiGLU, no biases.

https://arxiv.org/abs/2307.09288, https://arxiv.org/abs/2407.21783; HF's name is LlamaForCausalLM. Left out: biases, and
every way of scaling rotary positions but Llama 3's own.
"""

from conversion.families.config import Family
from conversion.families.rows import QKV, AttentionOutput, FeedForwardOutput, GateUp, Replicated, Row, Vocabulary

EMBEDDING_AND_HEAD: tuple[Row, ...] = (
    Vocabulary(
        hf="model.embed_tokens.weight",
        megatron="embedding.word_embeddings.weight",
        stage="first",
    ),
    Replicated(
        hf="model.norm.weight",
        megatron="decoder.final_layernorm.weight",
        stage="last",
    ),
    Vocabulary(
        hf="lm_head.weight",
        megatron="output_layer.weight",
        stage="last",
        tied_to="model.embed_tokens.weight",
    ),
)
ATTENTION: tuple[Row, ...] = (
    Replicated(
        hf="model.layers.{i}.input_layernorm.weight",
        megatron="decoder.layers.{n}.input_layernorm.weight",
        megatron_fused_norms="decoder.layers.{n}.self_attention.linear_qkv.layer_norm_weight",
    ),
    QKV(
        hf="model.layers.{i}.self_attn.{part}_proj.weight",
        megatron="decoder.layers.{n}.self_attention.linear_qkv.weight",
        vllm="model.layers.{i}.self_attn.qkv_proj.weight",
    ),
    AttentionOutput(
        hf="model.layers.{i}.self_attn.o_proj.weight",
        megatron="decoder.layers.{n}.self_attention.linear_proj.weight",
    ),
)
FEED_FORWARD: tuple[Row, ...] = (
    Replicated(
        hf="model.layers.{i}.post_attention_layernorm.weight",
        megatron="decoder.layers.{n}.pre_mlp_layernorm.weight",
        megatron_fused_norms="decoder.layers.{n}.mlp.linear_fc1.layer_norm_weight",
    ),
    GateUp(
        hf="model.layers.{i}.mlp.{part}_proj.weight",
        megatron="decoder.layers.{n}.mlp.linear_fc1.weight",
        vllm="model.layers.{i}.mlp.gate_up_proj.weight",
    ),
    FeedForwardOutput(
        hf="model.layers.{i}.mlp.down_proj.weight",
        megatron="decoder.layers.{n}.mlp.linear_fc2.weight",
    ),
)
ROWS = (*EMBEDDING_AND_HEAD, *ATTENTION, *FEED_FORWARD)

LLAMA = Family(
    architecture="LlamaForCausalLM",
    model_type="llama",
    rows=ROWS,
    only={"attention_bias": (False,), "mlp_bias": (False,), "rope_interleaved": (False,), "sliding_window": (None,)},
    harmless=frozenset({"pretraining_tp", "is_llama_config", "layer_types"}),
    rope_types=("default", "llama3"),
)
