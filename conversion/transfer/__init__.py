"""Ways to carry a `WeightPlan` out between processes, in buckets of bounded size (`buckets.py`).

`shared_memory.py` within one machine, `cuda_ipc.py` within one GPU, `process_group.py` (gloo, NCCL) between processes
that share neither; `route.py` chooses. A sender has `send(version)`, a receiver `receive(version)`, both `close()`;
they run at the same time.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from conversion.plan import Piece


class TransferError(RuntimeError):
    """The weights could not be carried over: an end is late, gone, or works by another plan; the message names it."""


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
