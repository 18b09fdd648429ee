"""Ways to carry a `WeightPlan` out between processes. So far: shared memory, within one machine."""

from collections.abc import Mapping

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
