"""Qwen3 with experts in every layer: Qwen3's attention, a router, and one SwiGLU an expert.

https://arxiv.org/abs/2505.09388; HF's name is Qwen3MoeForCausalLM. Left out: models that mix dense layers in
(decoder_sparse_step, mlp_only_layers), and the load-balancing loss, which is no part of the method.
"""

from conversion.families import llama
from conversion.families.config import Family
from conversion.families.qwen3 import HEAD_NORMS
from conversion.families.rows import ExpertGateUp, ExpertOutput, Replicated, Row

_EXPERTS: tuple[Row, ...] = (
    Replicated(  # before a router Transformer Engine has no linear layer to fuse it with
        hf="model.layers.{i}.post_attention_layernorm.weight",
        megatron="decoder.layers.{n}.pre_mlp_layernorm.weight",
    ),
    Replicated(
        hf="model.layers.{i}.mlp.gate.weight",
        megatron="decoder.layers.{n}.mlp.router.weight",
        sizes=("num_experts", "hidden_size"),
    ),
    ExpertGateUp(
        hf="model.layers.{i}.mlp.experts.{e}.{part}_proj.weight",
        megatron="decoder.layers.{n}.mlp.experts.local_experts.{e}.linear_fc1.weight",
        vllm="model.layers.{i}.mlp.experts.routed_experts.w13_weight",
    ),
    ExpertOutput(
        hf="model.layers.{i}.mlp.experts.{e}.down_proj.weight",
        megatron="decoder.layers.{n}.mlp.experts.local_experts.{e}.linear_fc2.weight",
        vllm="model.layers.{i}.mlp.experts.routed_experts.w2_weight",
    ),
)

QWEN3_MOE = Family(
    architecture="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    rows=(*llama.EMBEDDING_AND_HEAD, *llama.ATTENTION, *HEAD_NORMS, *_EXPERTS),
    transformer={"qk_layernorm": True},
    required=(
        *("num_key_value_heads", "norm_topk_prob"),  # never guessed: transformers' defaults are of no real model
        *("num_experts", "num_experts_per_tok", "moe_intermediate_size"),
    ),
    only={
        "attention_bias": (False,),
        "use_sliding_window": (False,),
        "decoder_sparse_step": (1,),
        "mlp_only_layers": ([], None),
        "norm_topk_prob": (True, False),
    },
    # No window while use_sliding_window is false; the auxiliary loss is a matter of pre-training.
    harmless=frozenset(
        {"sliding_window", "max_window_layers", "layer_types", "output_router_logits", "router_aux_loss_coef"}
    ),
    head_dim="given",
    experts=True,
    aliases={"num_local_experts": "num_experts"},  # what transformers 5 writes
)
