"""What rank processes do with distributed checkpoints, in layouts that training has no configuration for."""

from contextlib import contextmanager
from pathlib import Path
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


def optimizer_states(pipe: Any, rank: int, port: int | None, *, job: Any, batch: Any, folder: str, writer: str) -> int:
    """Let ours ("ours") or Megatron ("Megatron") write the optimiser's state after a step, and the other read it.

    Returns how many tensors of the state that lie on this rank differ then.
    """
    import ranks as work
    import torch
    from megatron.core import dist_checkpointing, parallel_state

    from astar_megatron.model import optimizer_state

    with work.started(pipe, rank, port, job) as policy:
        policy.step(batch, job.loss, work._options(job, len(batch)))
        (chunk,), inner = policy._learning.chunks, policy._learning.optimizer.chained_optimizers
        metadata = {
            "distrib_optim_sharding_type": "fully_reshardable",
            "distrib_optim_fully_reshardable_mem_efficient": False,
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        }
        model = chunk.sharded_state_dict(metadata=metadata)
        states = [
            optimizer._get_main_param_and_optimizer_states(parameter)
            for optimizer in inner
            for parameter in optimizer.model_param_gbuf_map
        ]
        tensors = [state[name] for state in states for name in ("param", "exp_avg", "exp_avg_sq")]
        wanted = [tensor.clone() for tensor in tensors]
        if rank == 0:
            Path(folder).mkdir()
        work.all_here()

        def by_megatron(*, is_loading: bool) -> Any:
            arguments = {"is_loading": is_loading, "metadata": metadata}
            return {place: optimizer.sharded_state_dict(model, **arguments) for place, optimizer in enumerate(inner)}

        def by_us(make: Any) -> Any:
            return {place: make(optimizer, model) for place, optimizer in enumerate(inner)}

        state = by_us(optimizer_state.sharded) if writer == "ours" else by_megatron(is_loading=False)
        dist_checkpointing.save(state, folder)
        with torch.no_grad():
            for tensor in tensors:
                tensor.zero_()
        if writer == "ours":
            loaded: Any = dist_checkpointing.load(by_megatron(is_loading=True), folder)
            for place, optimizer in enumerate(inner):
                optimizer.load_parameter_state_from_fully_reshardable(loaded[place]["param_state"])
        else:
            loaded: Any = dist_checkpointing.load(by_us(optimizer_state.empty), folder)
            for place, optimizer in enumerate(inner):
                optimizer_state.take(optimizer, loaded[place])
        return sum(not torch.equal(tensor, other) for tensor, other in zip(tensors, wanted, strict=True))
