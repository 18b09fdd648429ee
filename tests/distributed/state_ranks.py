"""What the rank processes of test_rank_state.py do: they count the bytes of what a started rank holds."""

from collections.abc import Iterable
from typing import Any

from ranks import Job, started


def state(pipe: Any, rank: int, port: int | None, *, job: Job) -> dict[str, int]:
    """Return the bytes of a rank's parts, by the names of RankState."""
    from astar_megatron.model.parking import gradient_buffers, optimizer_tensors

    with started(pipe, rank, port, job) as policy:
        learning, critic = policy._learning, policy._critic
        own = [learning] if critic is None else [learning, critic.learning]
        models = [_parameters(each.chunks) for each in own]
        shared = {parameter.untyped_storage()._cdata for model in models for parameter in model}
        states = [tensor for each in own for tensor in optimizer_tensors(each.optimizer)]
        parts = {
            "weights": models[0],
            "gradients": [buffer for each in own for buffer in gradient_buffers(each.modules)],
            "optimizer": [tensor for tensor in states if tensor.untyped_storage()._cdata not in shared],
            "reference": _parameters(policy._reference.chunks),
            "critic": models[1] if critic else [],
        }
        return {name: _bytes(tensors) for name, tensors in parts.items()}


def _parameters(chunks: Any) -> list[Any]:
    from astar_megatron.model.build import named_parameters

    return [parameter.data for parameter in named_parameters(chunks).values()]


def _bytes(tensors: Iterable[Any]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
