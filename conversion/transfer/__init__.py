"""Ways to carry a `WeightPlan` out between processes, in buckets of bounded size (`buckets.py`).

`shared_memory.py` within one machine, `gloo.py` between processes that share none. A sender has `send(version)`, a
receiver `receive(version)`, both `close()`; they run at the same time. NCCL and CUDA IPC are not written yet.
"""

from collections.abc import Mapping

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
