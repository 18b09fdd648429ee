"""Builds Megatron's GPTModel from a conversion.families Model; the one file that knows GPTModel's arguments.

What follows from a layout is switched on without being asked for: sequence parallelism between the matrices that tensor
ranks share (same numbers, less memory, and experts need it), and, where replicas share the weights, reducing gradients
and gathering weights while others are computed. Leaves out: grouped GEMM for experts, their load-balancing loss (no
part of the method).

GPTModel is deprecated in megatron-core 0.19 in favour of HybridModel; when it goes, this file changes.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from torch import Tensor

from astar_megatron.config import Recompute
from astar_megatron.model.attention import PackedAttention, PackedRotaryEmbedding
from astar_megatron.model.backend import Backend
from conversion.families import Model
from conversion.tiles import ParallelLayout

_ACTIVATIONS = {"silu": torch.nn.functional.silu}
_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective"},  # attention's core
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def transformer_config(
    model: Model,
    layout: ParallelLayout,
    dtype: torch.dtype,
    backend: Backend,
    *,
    recompute: Recompute = "none",
    fp8: str | None = None,
) -> TransformerConfig:
    """Return megatron's description of `model` split by `layout`, computing in `dtype` (or `fp8`) on `backend`."""
    architecture = dict(model.transformer_config())
    architecture["activation_func"] = _ACTIVATIONS[architecture.pop("activation")]
    return TransformerConfig(
        **architecture,
        **backend.transformer_options(fp8),
        **_RECOMPUTE[recompute],
        tensor_model_parallel_size=layout.tensor,
        sequence_parallel=layout.tensor > 1,
        context_parallel_size=layout.context,
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
        # Transformer Engine's kernel sums what experts give for a token in a fixed order. Megatron's own sum on a GPU
        # takes any: policy and reference would differ at step 0.
        moe_permute_fusion=backend.uses_transformer_engine and bool(model.dims.num_experts),
    )


def initialise(layout: ParallelLayout) -> None:
    """Make megatron's process groups for `layout`; collective over all ranks, after init_process_group."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual if layout.virtual > 1 else None,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.tensor,
        create_gloo_process_groups=False,
    )


def build(model: Model, layout: ParallelLayout, config: TransformerConfig, backend: Backend) -> list[GPTModel]:
    """Return this rank's chunks of the model on the backend's device, with megatron's random weights.

    There are `layout.virtual` of them. Collective over the ranks of parallel_state: see `initialise`. ValueError where
    the device can't compute in the type of `config`.
    """
    backend.check(config.params_dtype, context=layout.context, has_experts=bool(model.dims.num_experts))
    return [_chunk(model, layout, config, backend, chunk) for chunk in range(layout.virtual)]


def build_copy(
    model: Model, layout: ParallelLayout, config: TransformerConfig, backend: Backend, weights: Mapping[str, Tensor]
) -> list[GPTModel]:
    """Return as `build` does, with `weights`, this rank's parameters of another model of this kind."""
    chunks = build(model, layout, config, backend)
    with torch.no_grad():
        for name, parameter in named_parameters(chunks).items():
            parameter.copy_(weights[name])
    return chunks


def named_parameters(chunks: Sequence[GPTModel]) -> dict[str, torch.nn.Parameter]:
    """Return the parameters of all chunks under the names that the tiles of `conversion` have for them."""
    if len(chunks) == 1:
        return dict(chunks[0].named_parameters())
    return {
        f"model{i}.{name}": parameter for i, part in enumerate(chunks) for name, parameter in part.named_parameters()
    }


def for_training(
    chunks: Sequence[GPTModel], config: TransformerConfig, *, overlap: bool
) -> list[DistributedDataParallel]:
    """Return the chunks as the schedule trains them, their gradients summed in float32 over the replicas.

    With `overlap`, for which every weight must get a gradient, while others are computed.
    """
    modules = [
        DistributedDataParallel(
            config=config,
            ddp_config=DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=True,
                overlap_grad_reduce=overlap,
                overlap_param_gather=overlap,
            ),
            module=in_compute_type(part, config),
            disable_bucketing=chunk > 0,  # only what is reduced last is worth cutting
        )
        for chunk, part in enumerate(chunks)
    ]
    if overlap:  # or each micro-batch would reduce its own gradients
        pauses: Any = [module.no_sync for module in modules]
        config.no_sync_func = pauses if len(modules) > 1 else pauses[0]
    return modules


def overlaps() -> bool:
    """Say whether gradients are reduced and weights gathered while others are computed: wherever there are replicas."""
    return parallel_state.get_data_parallel_world_size(with_context_parallel=True) > 1


def _chunk(model: Model, layout: ParallelLayout, config: TransformerConfig, backend: Backend, chunk: int) -> GPTModel:
    vp_stage = chunk if layout.virtual > 1 else None
    options = model.gpt_options()
    options["vocab_size"] = model.padded_vocab_size(layout)
    part = GPTModel(
        config=config,
        transformer_layer_spec=_layers(config, backend, vp_stage),
        pre_process=parallel_state.is_pipeline_first_stage() and chunk == 0,
        post_process=parallel_state.is_pipeline_last_stage() and chunk == layout.virtual - 1,
        parallel_output=True,
        position_embedding_type="rope",
        vp_stage=vp_stage,
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
    sum_weight_gradients_in_place(part)
    for router in part.modules():
        if isinstance(router, TopKRouter):
            router.router_replay = _BestFirst()  # type: ignore[assignment]
    return part.to(backend.device)


def sum_weight_gradients_in_place(part: torch.nn.Module) -> int:
    """Let each linear layer of Transformer Engine add its weight's gradient to the float32 sum; return how many do.

    Otherwise it makes a gradient in the compute type, which DistributedDataParallel adds: a pass over all weights a
    micro-batch, and a rounding. It is megatron's gradient_accumulation_fusion, switched on here because the config's
    also goes to the output layer, which would want apex for a product that the head does in its stead. The gradients
    of head and embedding, which share a weight or not, still go DistributedDataParallel's way.
    """
    linears = [module for module in part.modules() if hasattr(module, "fuse_wgrad_accumulation")]
    for linear in linears:
        linear.fuse_wgrad_accumulation = True  # type: ignore[assignment]
    return len(linears)


def in_compute_type(part: GPTModel, config: TransformerConfig) -> Any:
    """Return `part` as the schedule runs it: in bfloat16 behind megatron's casts, or itself in float32."""
    return Float16Module(config, part) if config.bf16 else part


class _BestFirst:
    """What a router asks for its experts, in the place of megatron's RouterReplay: the best k, sorted, in every pass.

    Megatron sorts them only where gradients are asked for, and the softmax over k scores adds up in their order: the
    reference, the policy's own scoring and what full recomputation computes again would differ in the last digit.
    """

    layer_number: int | None = None  # the router sets it

    def get_replay_topk(self, scores: Tensor, topk: int, *_: Any) -> tuple[Tensor, Tensor]:
        return torch.topk(scores, topk, dim=1, sorted=True)


class _RMSNorm(torch.nn.RMSNorm):
    """torch's, marked: with sequence parallelism a rank has a part of the weight's gradient, and megatron sums them."""

    returns_residual = False

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def _layers(config: TransformerConfig, backend: Backend, vp_stage: int | None) -> Any:
    kinds = {
        "num_experts": config.num_moe_experts,
        "moe_grouped_gemm": config.moe_grouped_gemm,
        "qk_layernorm": config.qk_layernorm,
    }
    if backend.uses_transformer_engine:
        return get_gpt_layer_with_transformer_engine_spec(**kinds)
    spec: Any = get_gpt_layer_local_spec(normalization="RMSNorm", **kinds)
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    layer.input_layernorm = layer.pre_mlp_layernorm = _RMSNorm
    attention.q_layernorm = attention.k_layernorm = _RMSNorm if config.qk_layernorm else IdentityOp
    if config.num_moe_experts:  # in checkpoints the norm before a router has Transformer Engine's name, on every lane
        layer.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
    number = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[spec] * number, layer_norm=_RMSNorm)
