"""The state of a distributed optimizer in a checkpoint: each rank writes and reads what it holds, and nothing else.

Megatron-Core 0.19 can store it by the parameters' global shapes too, but gathers the whole state on every data-parallel
rank for that, 12 bytes a parameter in each one's host memory. Here a rank's piece, a range of a parameter's elements,
is cut into boxes of the parameter: part of a row, whole rows, part of a row. Names and shapes in the files are those of
Megatron's `fully_reshardable`, so each reads what the other wrote.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from torch import Tensor

type _Entry = ShardedTensor | ShardedTensorFactory  # of a parameter in the sharded state of a model


class Box(NamedTuple):
    """Neighbours in the flat order of a tensor's elements that are a box of the tensor too."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]


def sharded(optimizer: Any, model_state: Mapping[str, Any]) -> dict[int, dict[str, dict[int, ShardedTensor]]]:
    """Return this rank's pieces, uncopied: of each parameter that it has some of, of each state, the boxes in order.

    `optimizer` is a DistributedOptimizer whose states are there, `model_state` the sharded state of its model's chunks.
    """
    return _boxes_of_all(optimizer, model_state, lambda parameter: _states(optimizer, parameter))


def empty(optimizer: Any, model_state: Mapping[str, Any]) -> dict[int, dict[str, dict[int, ShardedTensor]]]:
    """Return the same with tensors of their own in host memory, for `take` when they have been loaded."""

    def states(parameter: Any) -> dict[str, Tensor]:
        piece = _piece(optimizer, parameter)
        return {name: torch.empty(piece.stop - piece.start) for name in _names(optimizer)}

    return _boxes_of_all(optimizer, model_state, states)


def take(optimizer: Any, loaded: Mapping[int, Mapping[str, Mapping[int, Tensor]]]) -> None:
    """Set the state to what `empty` has become."""
    with torch.no_grad():
        for index, parameter in enumerate(optimizer.model_param_gbuf_map):
            flat = {name: _joined(of_state) for name, of_state in loaded[index].items()}
            optimizer._set_main_param_and_optimizer_states(parameter, flat)
    if isinstance(optimizer.optimizer, HybridDeviceOptimizer):
        optimizer.optimizer._sync_hdo_state_to_sub_optimizers()


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """Cut the elements [start, stop) of a tensor of this shape, numbered flat, into boxes, in their order."""
    if start >= stop:
        return
    if len(shape) == 1:
        yield Box((start,), (stop - start,))
        return
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row  # the whole rows
    if first > last:
        yield from _within(shape, last, start, stop)
        return
    yield from _within(shape, first - 1, start, first * row)
    if first < last:
        yield Box((first, *[0] * (len(shape) - 1)), (last - first, *shape[1:]))
    yield from _within(shape, last, last * row, stop)


def _within(shape: Sequence[int], row: int, start: int, stop: int) -> Iterator[Box]:
    """The boxes of [start, stop), which lies in one row."""
    begin = row * prod(shape[1:])
    for box in boxes(shape[1:], start - begin, stop - begin):
        yield Box((row, *box.offset), (1, *box.shape))


def _joined(of_state: Mapping[int, Tensor]) -> Tensor:
    return torch.cat([of_state[index].flatten() for index in range(len(of_state))])


def _boxes_of_all(
    optimizer: Any, model_state: Mapping[str, Any], states: Callable[[Any], dict[str, Tensor]]
) -> dict[int, Any]:
    sharded_tensors, _ = extract_sharded_tensors_and_factories(dict(model_state))
    of_model = {entry.data: entry for entry in nested_values(sharded_tensors)}
    return {
        index: {
            name: dict(enumerate(_boxes(of_model[parameter], name, tensor, _piece(optimizer, parameter))))
            for name, tensor in states(parameter).items()
        }
        for index, parameter in enumerate(optimizer.model_param_gbuf_map)
    }


def _boxes(entry: _Entry, name: str, tensor: Tensor, piece: slice) -> Iterator[ShardedTensor]:
    """Yield the boxes of `tensor`, the elements `piece` of a parameter that the model stores as `entry` says."""
    for part, begin in _parts(entry):
        start, stop = max(piece.start, begin), min(piece.stop, begin + prod(part.local_shape))
        at, prepended = start - piece.start, part.prepend_axis_num
        base = part.global_offset[prepended:]
        pipeline, tensor_parallel, _ = part.replica_id  # type: ignore[misc]
        for box in boxes(part.local_shape, start - begin, stop - begin):
            shape, count = (*[1] * prepended, *box.shape), prod(box.shape)
            yield dataclasses.replace(
                part,
                key=f"optimizer.state.{name}.{part.key}",
                data=tensor[at : at + count].view(shape),
                dtype=tensor.dtype,
                local_shape=shape,
                global_offset=(*part.global_offset[:prepended], *map(sum, zip(base, box.offset, strict=True))),
                axis_fragmentations=None,  # boxes are no regular grid
                prepend_axis_num=0,
                replica_id=(pipeline, tensor_parallel, 0),  # no other data-parallel rank has this piece
            )
            at += count


def _parts(entry: _Entry) -> Iterator[tuple[ShardedTensor, int]]:
    """Yield what a parameter is stored as, without data, and at which of its elements each begins.

    A factory cuts a parameter into several: the two halves of a gated layer are tensors of their own.
    """
    if isinstance(entry, ShardedTensor):
        yield entry.without_data(), 0
        return
    shape = torch.empty(entry.data.shape, device="meta")
    for part in nested_values(entry.build_fn(entry.key, shape, entry.replica_id, None)):
        if not part.data.is_contiguous():
            raise AssertionError(f"{part.key} is no range of the elements of its parameter")
        yield part.without_data(), part.data.storage_offset()


def _states(optimizer: Any, parameter: Any) -> dict[str, Tensor]:
    """Return this rank's piece of the master weights ("param") and of each of Adam's moments: flat, float32."""
    states = optimizer._get_main_param_and_optimizer_states(parameter)
    return {name: states[name].detach().float().flatten() for name in _names(optimizer)}


def _names(optimizer: Any) -> tuple[str, ...]:
    return "param", *optimizer.optimizer_state_keys


def _piece(optimizer: Any, parameter: Any) -> slice:
    """Return which elements of a parameter this rank's state is of."""
    buffer, dtype, bucket = optimizer.model_param_gbuf_map[parameter]
    elements = optimizer.gbuf_ranges[buffer][dtype][bucket]["param_map"][parameter]["param"]
    return slice(elements.start, elements.end)
