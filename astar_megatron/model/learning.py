"""A model that learns, on one rank: policy and critic are one each.

A gradient or a loss that is not finite spoils no weight: the step is left out, on all ranks alike, and neither
optimizer nor schedule notice that it was there.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from astar_megatron.config import OptimConfig
from astar_megatron.model.build import for_training, named_parameters
from astar_megatron.model.optimizer import make_optimizer, make_schedule

type Dither = Callable[[Any, Mapping[str, Tensor]], None]  # of an optimizer's masters of the parameters of these names


@dataclass(frozen=True, slots=True)
class Learning:
    """This rank's chunks of a model, the data-parallel modules round them, their optimizer and its learning rate."""

    chunks: list[GPTModel]
    modules: list[DistributedDataParallel]
    optimizer: Any
    schedule: OptimizerParamScheduler

    def zero_grad(self) -> None:
        """Begin a new gradient."""
        for module in self.modules:
            module.zero_grad_buffer()
        self.optimizer.zero_grad()

    def step(self, *, is_finite: bool, device: torch.device) -> tuple[bool, float]:
        """Take the step of the accumulated gradients where they and all losses are finite; collective over all ranks.

        `is_finite` says so of this rank's losses. Returns whether the step was taken, and the gradients' norm before
        clipping. Otherwise weights, optimizer and schedule are bitwise what they were.
        """
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm() or 0.0)  # of all ranks: NaN or Inf of one of them is in it
        bad = torch.tensor(float(not (is_finite and math.isfinite(norm))), device=device)
        dist.all_reduce(bad, op=dist.ReduceOp.MAX)
        if bad.item():
            return False, norm
        self.schedule.step(increment=1)
        taken, *_ = self.optimizer.step()
        assert taken, "megatron's optimizer left a step out that was finite"
        return True, norm


def make_learning(
    chunks: list[GPTModel],
    config: TransformerConfig,
    optim: OptimConfig,
    num_steps: int,
    dither: Dither | None,
    *,
    overlap: bool,
) -> Learning:
    """Return a model's chunks ready to learn over `num_steps` optimiser steps; collective over all ranks.

    `config` is megatron's description of this model, which no other shares: its schedule finds the optimizer there.
    `overlap` as in `build.for_training`.
    """
    modules = for_training(chunks, config, overlap=overlap)
    optimizer = make_optimizer(modules, optim, config.params_dtype, overlap=overlap)
    if dither is not None:
        dither(optimizer, named_parameters(chunks))
    schedule = make_schedule(optimizer, optim, num_steps)
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    return Learning(chunks, modules, optimizer, schedule)
