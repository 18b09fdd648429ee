"""Llama (1 to 3.x without rope scaling, SmolLM2, ...): RMSNorm, rotary attention with query groups, SwiGLU, no biases.

https://arxiv.org/abs/2307.09288; HF's name is LlamaForCausalLM. Left out: rope scaling (Llama 3.1 and later), biases.
"""

from conversion.families.config import Family
from conversion.families.rows import QKV, AttentionOutput, FeedForwardOutput, GateUp, Replicated, Row, Vocabulary

ROWS: tuple[Row, ...] = (
    Vocabulary(
        hf="model.embed_tokens.weight",
        megatron="embedding.word_embeddings.weight",
        vllm="model.embed_tokens.weight",
        stage="first",
    ),
    Replicated(
        hf="model.layers.{i}.input_layernorm.weight",
        megatron="decoder.layers.{n}.input_layernorm.weight",
        megatron_fused_norms="decoder.layers.{n}.self_attention.linear_qkv.layer_norm_weight",
        vllm="model.layers.{i}.input_layernorm.weight",
    ),
    QKV(
        hf="model.layers.{i}.self_attn.{part}_proj.weight",
        megatron="decoder.layers.{n}.self_attention.linear_qkv.weight",
        vllm="model.layers.{i}.self_attn.qkv_proj.weight",
    ),
    AttentionOutput(
        hf="model.layers.{i}.self_attn.o_proj.weight",
        megatron="decoder.layers.{n}.self_attention.linear_proj.weight",
        vllm="model.layers.{i}.self_attn.o_proj.weight",
    ),
    Replicated(
        hf="model.layers.{i}.post_attention_layernorm.weight",
        megatron="decoder.layers.{n}.pre_mlp_layernorm.weight",
        megatron_fused_norms="decoder.layers.{n}.mlp.linear_fc1.layer_norm_weight",
        vllm="model.layers.{i}.post_attention_layernorm.weight",
    ),
    GateUp(
        hf="model.layers.{i}.mlp.{part}_proj.weight",
        megatron="decoder.layers.{n}.mlp.linear_fc1.weight",
        vllm="model.layers.{i}.mlp.gate_up_proj.weight",
    ),
    FeedForwardOutput(
        hf="model.layers.{i}.mlp.down_proj.weight",
        megatron="decoder.layers.{n}.mlp.linear_fc2.weight",
        vllm="model.layers.{i}.mlp.down_proj.weight",
    ),
    Replicated(
        hf="model.norm.weight",
        megatron="decoder.final_layernorm.weight",
        vllm="model.norm.weight",
        stage="last",
    ),
    Vocabulary(
        hf="lm_head.weight",
        megatron="output_layer.weight",
        vllm="lm_head.weight",
        stage="last",
        tied_to="model.embed_tokens.weight",
    ),
)

LLAMA = Family(
    architecture="LlamaForCausalLM",
    model_type="llama",
    rows=ROWS,
    add_qkv_bias=False,
    only={"attention_bias": (False,), "mlp_bias": (False,), "rope_interleaved": (False,), "sliding_window": (None,)},
    harmless=frozenset({"pretraining_tp", "is_llama_config"}),
)
