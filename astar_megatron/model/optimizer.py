"""AdamW through Megatron's distributed optimizer, and its learning rate over the run.

Biases and norms, all parameters of one dimension, do not decay.
"""

from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from astar_megatron.config import OptimConfig

_STYLES = {"constant": "constant", "cosine": "cosine", "wsd": "WSD"}


def make_optimizer(modules: list[Any], optim: OptimConfig, dtype: torch.dtype, *, overlap: bool) -> Any:
    """Return Megatron's optimizer of the DistributedDataParallel `modules`, with its state; collective over all ranks.

    `overlap` says that they gather weights while others are computed.
    """
    optimizer: Any = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=optim.lr,
            min_lr=_min_lr(optim),
            weight_decay=optim.weight_decay,
            adam_beta1=optim.adam_beta1,
            adam_beta2=optim.adam_beta2,
            adam_eps=optim.adam_eps,
            clip_grad=optim.clip_grad,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=True,
            overlap_param_gather=overlap,
            optimizer_cpu_offload=optim.offload,
            optimizer_offload_fraction=1.0 if optim.offload else 0.0,
            use_precision_aware_optimizer=optim.offload,  # Megatron offloads through that path only
        ),
        modules,
        use_gloo_process_groups=False,
    )
    for inner in optimizer.chained_optimizers:
        if inner.optimizer is not None:  # a rank may have no parameters of a kind
            _fill_state(inner.optimizer)
    return optimizer


def _fill_state(adam: Any) -> None:
    """Give a fresh Adam the moments that its first step would make, all 0.

    So a rank holds from the beginning what it will hold, and can be saved and loaded before it has taken a step.
    """
    is_hybrid = isinstance(adam, HybridDeviceOptimizer)
    for sub_optimizer in adam.sub_optimizers if is_hybrid else [adam]:
        # Transformer Engine's counts steps in its groups, torch's beside the moments.
        counts_here = isinstance(sub_optimizer, torch.optim.Adam)
        for group in sub_optimizer.param_groups:
            for parameter in group["params"]:
                state = sub_optimizer.state[parameter]
                if counts_here:
                    state["step"] = torch.tensor(0.0)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    if is_hybrid:
        adam._sync_sub_optimizers_state_to_hdo()


def make_schedule(optimizer: Any, optim: OptimConfig, num_steps: int) -> OptimizerParamScheduler:
    """Return the learning rate over `num_steps` optimiser steps: `.step(1)` sets it before each of them.

    The decay would reach `optim.min_lr` one step after the last, so that no step is taken with a rate of 0.
    """
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optim.lr,
        min_lr=_min_lr(optim),
        lr_warmup_steps=optim.warmup_steps,
        lr_decay_steps=max(num_steps, optim.warmup_steps) + 1,
        lr_decay_style=_STYLES[optim.schedule],
        wsd_decay_steps=(optim.decay_steps or 0) + 1,
        lr_wsd_decay_style="linear",
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=1,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,  # a resumed run takes the learning rate of its configuration
    )


def describe(optimizer: Any) -> str:
    """Say in words whose AdamW computes."""
    kinds = {type(inner.optimizer) for inner in optimizer.chained_optimizers if inner.optimizer is not None}
    return ", ".join(sorted(f"{kind.__name__} of {kind.__module__.partition('.')[0]}" for kind in kinds))


def learning_rate(optimizer: Any) -> float:
    return float(optimizer.param_groups[0]["lr"])


def _min_lr(optim: OptimConfig) -> float:
    return optim.lr if optim.schedule == "constant" else optim.min_lr
