"""Builds Megatron's GPTModel from a conversion.families Model; the one file that knows GPTModel's arguments.

Leaves out: grouped GEMM for experts, and training experts with tensor parallelism (it needs sequence parallelism).
GPTModel is deprecated in megatron-core 0.19 in favour of HybridModel; when it goes, this file changes.
"""

import dataclasses
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module

from astar_megatron.model.attention import PackedAttention, PackedRotaryEmbedding
from astar_megatron.model.backend import Backend
from conversion.families import Model
from conversion.tiles import ParallelLayout

_ACTIVATIONS = {"silu": torch.nn.functional.silu}


def transformer_config(
    model: Model, layout: ParallelLayout, dtype: torch.dtype, backend: Backend, fp8: str | None = None
) -> TransformerConfig:
    """Return megatron's description of `model` split by `layout`, computing in `dtype` (or `fp8`) on `backend`."""
    architecture = dict(model.transformer_config())
    architecture["activation_func"] = _ACTIVATIONS[architecture.pop("activation")]
    return TransformerConfig(
        **architecture,
        **backend.transformer_options(fp8),
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual if layout.virtual > 1 else None,
        # With two stages the previous rank is the next one, and gloo mixes up a batch of both messages: silently.
        batch_p2p_comm=layout.virtual == 1,
        overlap_p2p_comm=layout.virtual > 1,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.tensor,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        attention_softmax_in_fp32=True,
        # Micro-batches differ in length; with that megatron demands the alltoall dispatcher, even without experts.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
    )


def build(
    model: Model, layout: ParallelLayout, config: TransformerConfig, backend: Backend, chunk: int | None = None
) -> GPTModel:
    """Return this rank's part of the model on the backend's device, with megatron's random weights.

    `chunk` is the index of one of `layout.virtual` model chunks, None where there is only one. Collective over the
    ranks of parallel_state, which must be initialised for `layout`.
    """
    options = model.gpt_options()
    options["vocab_size"] = model.padded_vocab_size(layout)
    part = GPTModel(
        config=config,
        transformer_layer_spec=_layer_spec(config, backend),
        pre_process=parallel_state.is_pipeline_first_stage() and not chunk,
        post_process=parallel_state.is_pipeline_last_stage() and chunk in (None, layout.virtual - 1),
        parallel_output=True,
        position_embedding_type="rope",
        vp_stage=chunk,
        **options,
    )
    if not backend.uses_transformer_engine:
        part.rotary_pos_emb = PackedRotaryEmbedding(
            kv_channels=config.kv_channels or 0,
            rotary_percent=options["rotary_percent"],
            rotary_base=options["rotary_base"],
            use_cpu_initialization=True,
        )
    scaling = model.rope_scaling()
    if scaling is not None:  # GPTModel's own arguments leave all but the factor fixed
        rotary: Any = part.rotary_pos_emb
        rotary.inv_freq = rotary._apply_scaling(rotary.inv_freq, **dataclasses.asdict(scaling))
    return part.to(backend.device)


def in_compute_type(part: GPTModel, config: TransformerConfig) -> Any:
    """Return `part` as the schedule runs it: in bfloat16 behind megatron's casts, or itself in float32."""
    return Float16Module(config, part) if config.bf16 else part


def _layer_spec(config: TransformerConfig, backend: Backend) -> Any:
    kinds = {
        "num_experts": config.num_moe_experts,
        "moe_grouped_gemm": config.moe_grouped_gemm,
        "qk_layernorm": config.qk_layernorm,
    }
    if backend.uses_transformer_engine:
        return get_gpt_layer_with_transformer_engine_spec(**kinds)
    spec: Any = get_gpt_layer_local_spec(normalization="RMSNorm", **kinds)
    spec.submodules.self_attention.submodules.core_attention = PackedAttention
    if config.num_moe_experts:  # in checkpoints the norm before a router has Transformer Engine's name, on every lane
        spec.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
    return spec
