"""What rank processes do with distributed checkpoints, in layouts that training has no configuration for."""

from contextlib import contextmanager
from typing import Any

from ranks import join


@contextmanager
def _built(pipe: Any, rank: int, port: int | None, source: str, layout: Any) -> Any:
    """Yield this rank's part of the model of `source`, built by Megatron in `layout` and filled from the folder.

    `layout` has one chunk a stage.
    """
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel

    from astar_megatron.model import backend as backends
    from astar_megatron.model.build import build, initialise, transformer_config
    from conversion import hf
    from conversion.families import read_model
    from conversion.plan import plan

    backend = backends.choose()
    join(pipe, rank, port, layout.world_size)
    initialise(layout)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    try:
        model = read_model(source)
        (part,) = build(model, layout, transformer_config(model, layout, torch.float32, backend), backend)
        tensors = {name: parameter.data.zero_() for name, parameter in part.named_parameters()}  # so is the padding
        hf.load(source, plan(model.hf_tiles(), model.megatron_tiles(layout)), rank, tensors)
        yield part
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def loaded_strictly(pipe: Any, rank: int, port: int | None, *, source: str, layout: Any, folder: str) -> list[str]:
    """Let Megatron load a checkpoint over zeros, nothing missing and nothing left over; the parameters that differ."""
    import torch
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    with _built(pipe, rank, port, source, layout) as part:
        wanted = {name: parameter.data.clone() for name, parameter in part.named_parameters()}
        for parameter in part.parameters():
            parameter.data.zero_()
        state = part.sharded_state_dict()
        part.load_state_dict(dist_checkpointing.load(state, folder, strict=StrictHandling.RAISE_ALL))
        return [name for name, parameter in part.named_parameters() if not torch.equal(parameter.data, wanted[name])]


def saved(pipe: Any, rank: int, port: int | None, *, source: str, layout: Any, folder: str) -> None:
    """Let Megatron save the model of `source` as a distributed checkpoint."""
    from megatron.core import dist_checkpointing

    with _built(pipe, rank, port, source, layout) as part:
        dist_checkpointing.save(part.sharded_state_dict(), folder)


def damaged_export(pipe: Any, rank: int, port: int | None, *, source: str, layout: Any, fault: Any) -> str:
    """Return what the check of an export says on this rank, where its files lack `fault` = (name, row)."""
    import torch

    from astar_megatron.model.export_check import check_export
    from conversion import hf
    from conversion.families import read_model
    from conversion.plan import WeightMismatch, plan

    with _built(pipe, rank, port, source, layout) as part:
        model = read_model(source)
        weight_plan = plan(model.megatron_tiles(layout), model.hf_tiles())
        tensors = {name: parameter.data for name, parameter in part.named_parameters()}
        written = {name: torch.empty(shape) for name, shape in model.parameters().items()} if rank == 0 else None
        if written is not None:
            hf.load(source, plan(model.hf_tiles(), model.hf_tiles()), 0, written)
            if fault:
                written[fault[0]][fault[1]] += 1
        try:
            return f"{len(check_export(weight_plan, tensors, torch.float32, 4, written))} digests"
        except WeightMismatch as error:
            return f"{error.tensor}, row {error.row}"
