"""The parts of tensors that a plan's pieces name, and the places in a buffer that they go by."""

from collections.abc import Mapping

import torch
from torch import Tensor

from conversion.plan import Piece


def view(tensors: Mapping[str, Tensor], piece: Piece) -> Tensor:
    """The part of the local tensors that `piece` names. ValueError if they do not have it (slicing would clip)."""
    tensor = tensors.get(piece.name)
    if tensor is None:
        raise ValueError(f"rank {piece.rank} has no tensor {piece.name}, which the plan names")
    inside = tensor.dim() == len(piece.index)
    if not inside or any(stop > n for n, (_, stop) in zip(tensor.shape, piece.index, strict=True)):
        raise ValueError(
            f"{piece.name} on rank {piece.rank} has shape {tuple(tensor.shape)}, the plan uses {piece.index}"
        )
    return tensor[piece.slices]


def placed(slots: Tensor, offset: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor of the shape of `like` that lies `offset` bytes into a buffer."""
    return slots[offset : offset + like.numel() * dtype.itemsize].view(dtype).view(like.shape)
