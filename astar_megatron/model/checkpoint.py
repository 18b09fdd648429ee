"""Distributed checkpoints of policy, optimizer, schedule and random state, through megatron's dist_checkpointing.

saving.py writes what is put together here. What is not a tensor (step, prompt cursor, contract) the driver keeps in a
JSON file beside it. Tensors are stored by their global shapes: another layout can load them.
"""

import json
from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch.distributed.checkpoint.api import CheckpointException

from astar_megatron.model import optimizer_state
from astar_megatron.model.backend import read_no_code
from astar_megatron.model.learning import Learning
from astar_megatron.model.reference import Reference
from astar_megatron.model.saving import Saving
from conversion.checkpoint_index import plain_in_torch, read_index
from conversion.folders import PROGRESS_FILE

_PLAIN = (bool, int, float, str, list, tuple, type(None))  # what is kept of an optimizer's groups
_COPIED = "reference_is_copy"


def begin_save(
    folder: Path, policy: Learning, reference: Reference, critic: Learning | None, thread: Executor
) -> Saving:
    """Copy the state as it is and let `thread` write it to `folder`, which is empty; collective over all ranks.

    The reference is in it where it is a copy of the policy. Raises StorageError.
    """
    state = _state(policy, loading=False) | _critic_state(critic, loading=False)
    with reference.on_device():
        return Saving(folder, state | (_reference_state(reference) if reference.is_copy else {}), thread)


def described(reference: Reference) -> dict[str, Any]:
    """Return what `load` reads in progress.json of how a checkpoint was made."""
    return {"layout": _layout(), _COPIED: reference.is_copy}


def load(folder: Path, policy: Learning, reference: Reference, critic: Learning | None) -> None:
    """Restore a checkpoint into what was built; collective over all ranks.

    In another layout the random states, which belong to ranks, stay as they are; nothing in a step draws from them.
    """
    saved = json.loads((folder / PROGRESS_FILE).read_text(encoding="utf-8"))
    state = _state(policy, loading=True) | _critic_state(critic, loading=True)
    if saved["layout"] != _layout():
        del state["random"]
    with reference.on_device():
        state |= _reference_state(reference) if saved[_COPIED] else {}
        loaded = _read(folder, state)
    if saved[_COPIED]:
        with reference.changing():
            for name, chunk in zip(_names(reference.chunks), reference.chunks, strict=True):
                chunk.load_state_dict(loaded[f"reference.{name}"])
    if critic is not None:
        _load_model(critic, loaded["critic"])
    _load_model(policy, loaded)
    if "random" in loaded:
        torch.set_rng_state(loaded["random"]["torch"])
        _tracker().set_states(loaded["random"]["tracker"])


def _read(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint has for a sharded state; ValueError on all ranks where one can't read its part."""
    read_no_code()
    plain_in_torch()
    problem, cause = "", None
    loaded: Any = {}
    try:
        read_index(folder)  # or refuses, in words of its own
        loaded = dist_checkpointing.load(state, str(folder))
    # torch and megatron raise a dozen kinds for files that are cut or missing, one of them no Exception
    except (Exception, CheckpointException) as error:
        problem, cause = f"{type(error).__name__}: {error!s:.300}", error
    problems = [problem] * dist.get_world_size()
    dist.all_gather_object(problems, problem)  # each rank reads other parts of the files
    if problem := next(filter(None, problems), ""):
        raise ValueError(
            f"{folder}: can't be read, a file of it is damaged or missing ({problem}); write the name of another "
            f"step_* folder into {folder.parent / 'latest'} and run the same command again"
        ) from cause
    return loaded


def _load_model(learning: Learning, loaded: dict[str, Any]) -> None:
    inner = learning.optimizer.chained_optimizers
    pieces = [part.pop("param_state", {}) for part in _of_each(inner, loaded["optimizer"])]
    _take_groups_of(learning.optimizer, loaded)
    for name, chunk in zip(_names(learning.chunks), learning.chunks, strict=True):
        chunk.load_state_dict(loaded[name])
    learning.optimizer.load_state_dict(loaded["optimizer"])
    for chained, loaded_pieces in zip(inner, pieces, strict=True):
        optimizer_state.take(chained, loaded_pieces)
    learning.schedule.load_state_dict(loaded["schedule"])


def _critic_state(critic: Learning | None, *, loading: bool) -> dict[str, Any]:
    """Return the sharded state of the critic, under names of its own."""
    if critic is None:
        return {}
    state = _state(critic, loading=loading)
    del state["random"]
    add_prefix_for_sharding(state, "critic.")
    return {"critic": state}


def _reference_state(reference: Reference) -> dict[str, Any]:
    """Return the sharded state of the reference, under names of its own."""
    state: dict[str, Any] = {}
    for name, chunk in zip(_names(reference.chunks), reference.chunks, strict=True):
        state[f"reference.{name}"] = chunk.sharded_state_dict(
            metadata={"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
        )
    add_prefix_for_sharding(state, "reference.")
    return state


def _take_groups_of(optimizer: Any, loaded: dict[str, Any]) -> None:
    """Give a loaded optimizer state the groups of parameters that `optimizer` has now; of the saved, the step count.

    They follow from the configuration (learning rates) and the layout (experts on their own have an optimizer of their
    own), and megatron would look for those of the run that saved.
    """
    saved, inner = loaded["optimizer"], optimizer.chained_optimizers
    step = _saved_step(saved)
    parts = _of_each(inner, saved)
    for chained, part in zip(inner, parts, strict=True):
        part |= chained.state_dict()
        for group in part["optimizer"]["param_groups"]:
            group["step"] = step
    loaded["optimizer"] = saved if len(inner) == 1 else dict(enumerate(parts))


def _saved_step(saved: dict[Any, Any]) -> int:
    """Return how many steps an optimizer had taken; each of its groups, at whatever depth, says so.

    torch's Adam says so as a float, which Transformer Engine's does not take.
    """
    groups = saved["optimizer"]["param_groups"] if "optimizer" in saved else saved[0]["optimizer"]["param_groups"]
    return int(max((group["step"] for group in groups if "step" in group), default=0))


def _layout() -> dict[str, int]:
    return {
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
    }


def _names(chunks: Sequence[Any]) -> list[str]:
    return ["model"] if len(chunks) == 1 else [f"model{index}" for index in range(len(chunks))]


def _state(learning: Learning, *, loading: bool) -> dict[str, Any]:
    """Return the sharded state."""
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    parts = [chunk.sharded_state_dict(metadata=metadata) for chunk in learning.chunks]
    model = dict(zip(_names(learning.chunks), parts, strict=True))
    tensor, pipeline = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
    )
    return {
        **model,
        "optimizer": _optimizer_state(learning.optimizer, model, loading=loading),
        "schedule": learning.schedule.state_dict(),
        "random": ShardedObject(
            "random",
            {"torch": torch.get_rng_state(), "tracker": _tracker().get_states()},
            (_layout()["pipeline"], _layout()["tensor"]),
            (pipeline, tensor),
            replica_id=parallel_state.get_data_parallel_rank(with_context_parallel=True),
        ),
    }


def _optimizer_state(optimizer: Any, model: dict[str, Any], *, loading: bool) -> dict[Any, Any]:
    """Return the sharded state of the optimizer of a `model`'s chunks; where it is a chain, of each by its number."""
    inner, states = optimizer.chained_optimizers, []
    if len(inner) > 1:
        optimizer._synchronize_steps()
    for chained in inner:
        if loading:
            chained.load_state_dict(chained.state_dict())  # tensors of a state are there, of whatever content
        pieces = (optimizer_state.empty if loading else optimizer_state.sharded)(chained, model)
        states.append(chained.state_dict() | {"param_state": pieces})
        for group in states[-1]["optimizer"]["param_groups"]:
            # With optim.offload classes stand there too, as Python's code, which a load would refuse.
            for name in [name for name, value in group.items() if not isinstance(value, _PLAIN)]:
                del group[name]
    return states[0] if len(states) == 1 else dict(enumerate(states))


def _of_each(inner: Sequence[Any], state: dict[Any, Any]) -> list[dict[Any, Any]]:
    """Return the parts of what `_optimizer_state` returned, an optimizer of the chain each."""
    return [state] if len(inner) == 1 else [state[index] for index in range(len(inner))]


def _tracker() -> Any:
    return get_cuda_rng_tracker()
