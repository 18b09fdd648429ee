"""A rank whose linear layer adds its weight's gradient to the float32 sum itself, as Transformer Engine's do."""

from typing import Any

import torch
from ranks import join
from torch import Tensor, nn


class _Product(torch.autograd.Function):
    """x @ weight.T; backward as Transformer Engine 2.20's: into main_grad, and a gradient that is no number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, in_place: bool, is_first: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.in_place, ctx.is_first = weight, in_place, is_first
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        x, weight = ctx.saved_tensors
        if not ctx.in_place:
            return slopes[0] @ weight, slopes[0].t() @ x, None, None
        gradient = slopes[0].float().t() @ x.float()
        if ctx.is_first:
            ctx.weight.main_grad.copy_(gradient)
        else:
            ctx.weight.main_grad.add_(gradient)
        ctx.weight.grad_added_to_main_grad = True
        return slopes[0] @ weight, torch.full_like(weight, torch.nan), None, None


class EngineLinear(nn.Linear):
    """With the attributes of Transformer Engine's by which megatron and build.py reach it."""

    fuse_wgrad_accumulation = False
    is_first_microbatch = True

    def forward(self, input: Tensor) -> Tensor:
        is_first, self.is_first_microbatch = self.is_first_microbatch, False
        return _Product.apply(input, self.weight, self.fuse_wgrad_accumulation, is_first)  # type: ignore[return-value]


class Model(nn.Module):
    """An embedding, which is also the head, round one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8, dtype=torch.bfloat16)
        self.linear = EngineLinear(8, 8, bias=False, dtype=torch.bfloat16)

    def forward(self, tokens: Tensor) -> Tensor:
        return (self.linear(self.embedding(tokens)) @ self.embedding.weight.t()).float().square().sum()


def gradients(pipe: Any, rank: int, port: int | None, *, in_place: bool) -> list[dict[str, tuple[Any, Any]]]:
    """Return of two mini-batches of three micro-batches each weight's summed gradient, and autograd's own sum of it.

    They are lists: tensors of a process that has ended can't be read.
    """
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.transformer import TransformerConfig

    from astar_megatron.model import backend as backends
    from astar_megatron.model.build import for_training, initialise, sum_weight_gradients_in_place
    from conversion.tiles import ParallelLayout

    backends.choose()
    join(pipe, rank, port, 1)
    initialise(ParallelLayout())
    try:
        torch.manual_seed(0)
        model: Any = Model()
        assert sum_weight_gradients_in_place(model) == 1 and model.linear.fuse_wgrad_accumulation
        model.linear.fuse_wgrad_accumulation = in_place
        config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, params_dtype=torch.bfloat16)
        (module,) = for_training([model], config, overlap=False)
        return [_mini_batch(module, model, first) for first in (0, 3)]
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _mini_batch(module: Any, model: Any, first: int) -> dict[str, tuple[Any, Any]]:
    plain = Model()
    plain.load_state_dict(model.state_dict())
    wanted = {name: torch.zeros(weight.shape) for name, weight in plain.named_parameters()}
    module.zero_grad_buffer()
    for number in range(first, first + 3):
        tokens = (torch.arange(32) * (number + 2)) % 11
        module(tokens).backward()
        plain.zero_grad()
        plain(tokens).backward()
        for name, weight in plain.named_parameters():
            wanted[name] += weight.grad.float()  # type: ignore[union-attr]
    return {name: (weight.main_grad.tolist(), wanted[name].tolist()) for name, weight in model.named_parameters()}
