"""The tensor-parallel group's part in the head: sums over ranks that autograd passes through in the right way."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp


def reduced(tensor: Tensor, group: ProcessGroup | None, op: Any = ReduceOp.SUM) -> Tensor:
    """Return `tensor` reduced over the group, in place; no gradient."""
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, op=op, group=group)
    return tensor


def shared(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """Return `tensor`, equal on all ranks; its gradient is the sum of the ranks' gradients."""
    return _Shared.apply(tensor, group)  # type: ignore[return-value]


def summed(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """Return the sum of the ranks' tensors; each rank's gradient is the gradient of the sum."""
    return _Summed.apply(tensor, group)  # type: ignore[return-value]


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup | None) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return reduced(gradients[0].clone(), ctx.group), None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup | None) -> Tensor:
        return reduced(tensor.clone(), group)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None
