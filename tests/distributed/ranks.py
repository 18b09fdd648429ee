"""What the rank processes of tests/distributed do: real PolicyRanks over gloo, one a process."""

import json
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from astar_megatron.algorithm.astar import AstarLoss

ASTAR = AstarLoss(beta2=0.05)


@dataclass(frozen=True)
class Job:
    """One layout of one model."""

    model_path: str
    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    context: int = 1
    data: int = 1
    expert: int = 1
    recompute: Literal["none", "selective", "full"] = "none"
    lr: float = 1e-3
    adam_eps: float = 1e-8
    micro_batch_tokens: int = 60
    dtype: Literal["bfloat16", "float32"] = "float32"
    dither: bool = True
    loss: Any = ASTAR
    critic_lr: float | None = None
    reference: str = "resident"

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def parallel(self) -> dict[str, Any]:
        names = ("tensor", "pipeline", "virtual", "context", "data", "expert", "recompute")
        return {name: getattr(self, name) for name in names}


def serve(pipe: Any, function: Any, rank: int, arguments: dict[str, Any]) -> None:
    """Run one function as `rank`; rank 0 first tells the port of the rendezvous, the others hear it."""
    try:
        port = None if rank == 0 else pipe.recv()
        pipe.send(function(pipe, rank, port, **arguments))
    except BaseException:
        pipe.send(traceback.format_exc())


def gloo_interface(pipe: Any, rank: int, port: int | None) -> str | None:
    """Return the interface on which ranks meet, as their environment has it; they need no port."""
    if rank == 0:
        pipe.send(0)
    return os.environ.get("GLOO_SOCKET_IFNAME")


def join(pipe: Any, rank: int, port: int | None, num_ranks: int) -> None:
    """Make the gloo group of all ranks."""
    import torch.distributed as dist
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    store = TCPStore("127.0.0.1", port or 0, is_master=rank == 0, wait_for_workers=False)
    if rank == 0:
        pipe.send(store.port)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)


@contextmanager
def started(pipe: Any, rank: int, port: int | None, job: Job) -> Iterator[Any]:
    """Yield the policy of a job as `rank`, started with the others."""
    from astar_megatron.config import OptimConfig, ParallelConfig
    from astar_megatron.model.options import PolicyOptions
    from astar_megatron.model.policy import PolicyRank

    options = PolicyOptions(
        model_path=job.model_path,
        dtype=job.dtype,
        parallel=ParallelConfig(**job.parallel),
        optim=OptimConfig(lr=job.lr, adam_eps=job.adam_eps, clip_grad=0.0, weight_decay=0.1, dither=job.dither),
        optimizer_steps=1,
        seed=0,
        critic_lr=job.critic_lr,
        reference=job.reference,
    )
    policy = PolicyRank(rank, options)
    if rank == 0:
        port = policy.listen("127.0.0.1")
        pipe.send(port)
    assert port is not None
    policy.start("127.0.0.1", port)
    try:
        yield policy
    finally:
        policy.close()


def head_errors(pipe: Any, rank: int, port: int | None, *, head: str, case: Any, num_ranks: int) -> Any:
    """Return how far a head is from float64, and scoring from training, when ranks share the vocabulary."""
    import head_cases
    import torch.distributed as dist

    join(pipe, rank, port, num_ranks)
    try:
        share: Any = {"rank": rank, "num_ranks": num_ranks, "group": dist.group.WORLD}
        return head_cases.errors(head, case, **share), head_cases.scoring_gap(head, case, **share)
    finally:
        dist.destroy_process_group()


def _options(job: Job, size: int) -> Any:
    from astar_megatron.types import StepOptions

    return StepOptions(temperature=0.8, mini_batch_size=size, micro_batch_tokens=job.micro_batch_tokens)


def gradients(
    pipe: Any, rank: int, port: int | None, *, job: Job, batch: Any, folder: str, size: int = 0, shared: str = ""
) -> Any:
    """Take one step in mini-batches of `size` (0: all) and return the statistics.

    `folder` gets the last gradient under HF names and, with a folder for the transfer in `shared`, the new weights.
    """
    with started(pipe, rank, port, job) as policy:
        stats = policy.step(batch, job.loss, _options(job, size or len(batch)))
        _gather_gradients(policy)
        write_gradients(policy, folder)
        if shared:
            policy.export(f"{folder}/weights", shared)
        return stats


def trained(
    pipe: Any, rank: int, port: int | None, *, job: Job, batches: Any, folder: str, shared: str, save: str | None
) -> Any:
    """Train on `batches`, the last of them in two mini-batches, from step 0; return the statistics.

    `folder` gets the last gradient of each batch and the weights in the end, under HF names; `save` a checkpoint.
    """
    with started(pipe, rank, port, job) as policy:
        reports = []
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            reports.append(policy.step(batch, job.loss, _options(job, len(batch) // 2 if last else len(batch))))
            _gather_gradients(policy)
            write_gradients(policy, f"{folder}/gradients{number}")
        policy.export(f"{folder}/weights", shared)
        if save:
            save_checkpoint(policy, save)
        return reports


def write_gradients(policy: Any, folder: str, own: dict[str, Any] | None = None) -> None:
    """Write the gradients under HF names, in float32, to `folder`/model.safetensors; collective, rank 0 writes.

    `own` are this rank's, if not those of the policy's parameters.
    """
    import torch
    import torch.distributed as dist
    from safetensors.torch import save_file

    from astar_megatron.model.build import named_parameters
    from conversion.plan import plan
    from conversion.transfer.pieces import view

    if own is None:
        parameters: dict[str, Any] = dict(named_parameters(policy._learning.chunks))
        own = {name: parameter.main_grad for name, parameter in parameters.items()}
    everywhere: list[Any] = [None] * policy.layout.world_size
    # Copies: with a view of the buffer of all gradients pickle would send all of it.
    dist.all_gather_object(everywhere, {name: tensor.cpu().clone() for name, tensor in own.items()})
    if policy.rank:
        return
    whole = {name: torch.zeros(shape) for name, shape in policy.model.parameters().items()}
    for copy in plan(policy.model.megatron_tiles(policy.layout), policy.model.hf_tiles()).copies:
        view(whole, copy.target).copy_(view(everywhere[copy.source.rank], copy.source))
    Path(folder).mkdir(parents=True)
    save_file(whole, Path(folder) / "model.safetensors")


def _gather_gradients(policy: Any) -> None:
    """Give every replica the whole gradient; the distributed optimizer leaves each the sum of its own shard only."""
    import torch.distributed as dist

    for module in policy._learning.modules:
        for group in module.bucket_groups + module.expert_parallel_bucket_groups:
            ranks = group.intra_distributed_optimizer_instance_group
            for bucket in group.buckets:
                own = bucket.grad_data.chunk(ranks.size())[ranks.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, own, group=ranks)


def save_checkpoint(policy: Any, folder: str) -> None:
    """Write a checkpoint as a run does, with what a rank reads of the driver's part; collective."""
    if policy.rank == 0:
        Path(folder).mkdir()
    all_here()
    made = policy.begin_save(folder)
    state = policy.save_state(wait=True)
    assert not state.problem, state.problem
    complete(policy, folder, made)


def complete(policy: Any, folder: str, made: dict[str, Any]) -> None:
    """Make what all ranks have written a checkpoint; collective."""
    all_here()
    policy.finish_save()
    if policy.rank == 0:
        (Path(folder) / "progress.json").write_text(json.dumps(made))
    all_here()


def all_here() -> None:
    """Wait for all ranks."""
    import torch.distributed as dist

    dist.barrier()


def logprobs(pipe: Any, rank: int, port: int | None, *, job: Job, token_ids: Any, prompt_tokens: Any) -> Any:
    """Return the response tokens' log-probs under the policy."""
    with started(pipe, rank, port, job) as policy:
        return policy.logprobs(token_ids, prompt_tokens)


def steps(pipe: Any, rank: int, port: int | None, *, job: Job, batches: Any, load: str | None, save: str | None) -> Any:
    """Train on `batches`, from the checkpoint `load` and saving to `save` where given; return the statistics."""
    with started(pipe, rank, port, job) as policy:
        if load:
            policy.load(load, batches[0].version)
        reports = [policy.step(batch, job.loss, _options(job, len(batch) // 2)) for batch in batches]
        if save:
            save_checkpoint(policy, save)
        return reports


def loaded_by_megatron(pipe: Any, rank: int, port: int | None, *, job: Job, folder: str) -> list[str]:
    """Let megatron load a checkpoint's weights over zeros; return the parameters that are not the HF folder's."""
    import torch
    from megatron.core import dist_checkpointing

    with started(pipe, rank, port, job) as policy:
        wanted = {name: weight.clone() for name, weight in policy.weights().items()}
        for weight in policy.weights().values():
            weight.zero_()
        (part,) = policy._learning.chunks
        state = part.sharded_state_dict()
        part.load_state_dict(dist_checkpointing.load(state, folder))
        loaded = policy.weights()
        rows = {name: _real_rows(policy, name) for name in wanted}
        return [name for name in wanted if not torch.equal(loaded[name][: rows[name]], wanted[name][: rows[name]])]


def _real_rows(policy: Any, name: str) -> int:
    """How many rows of a parameter are not vocabulary padding, which a checkpoint holds as zeros."""
    from megatron.core import parallel_state

    rows = len(policy.weights()[name])
    if "word_embeddings" not in name and "output_layer" not in name:
        return rows
    return max(0, min(rows, policy.model.vocab_size - parallel_state.get_tensor_model_parallel_rank() * rows))


def exported(
    pipe: Any, rank: int, port: int | None, *, job: Job, batches: Any, save: str, folder: str, shared: str
) -> None:
    """Train on `batches`, then write both a checkpoint and an HF folder of the same weights."""
    with started(pipe, rank, port, job) as policy:
        for batch in batches:
            policy.step(batch, job.loss, _options(job, len(batch)))
        save_checkpoint(policy, save)
        policy.export(folder, shared)


def logits(pipe: Any, rank: int, port: int | None, *, folders: Any, layout: Any, packs: Any) -> Any:
    """Return for each model folder, on the last stage, the [tokens, vocabulary shard] logits of each pack.

    A pack is a list of sequences. The ranks of the data axis take the packs in different order, each beginning with
    the one of its own index.
    """
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel

    from astar_megatron.model import backend as backends
    from astar_megatron.model.build import initialise

    backend = backends.choose()
    join(pipe, rank, port, layout.world_size)
    initialise(layout)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    cell = layout.cell(rank)
    assert parallel_state.get_tensor_model_parallel_rank() == cell.tensor
    assert parallel_state.get_pipeline_model_parallel_rank() == cell.pipeline
    assert parallel_state.get_expert_model_parallel_rank() == cell.expert
    first = layout.coordinates(rank)[2]
    mine = packs[first:] + packs[:first]
    try:
        return [_logits_of(folder, layout, rank, mine, backend) for folder in folders]
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _logits_of(folder: str, layout: Any, rank: int, packs: Any, backend: Any) -> Any:
    import torch
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from astar_megatron.model.attention import PackedSequences
    from astar_megatron.model.build import build, named_parameters, transformer_config
    from conversion import hf
    from conversion.families import read_model
    from conversion.megatron import check_tensors
    from conversion.plan import plan

    model = read_model(folder)
    config = transformer_config(model, layout, torch.float32, backend)
    many = layout.virtual > 1
    chunks: list[Any] = build(model, layout, config, backend)
    tensors = {name: parameter.data for name, parameter in named_parameters(chunks).items()}
    check_tensors(model, layout, rank, tensors)
    hf.load(folder, plan(model.hf_tiles(), model.megatron_tiles(layout)), rank, tensors)
    collected = []

    def collect(logits: Any, non_loss_data: bool = False) -> Any:
        collected.append(logits[0][: sum(map(len, packs[len(collected)]))].numpy())
        return logits

    def forward(iterator: Any, part: Any, *_: Any) -> Any:
        sequences = [list(ids) for ids in next(iterator)]
        sequences[-1] += [0] * (-sum(map(len, sequences)) % layout.tensor)  # the tensor ranks share the tokens
        positions = torch.cat([torch.arange(len(ids)) for ids in sequences])
        lengths = tuple(len(ids) for ids in sequences)
        out = part(
            input_ids=torch.tensor([[token for ids in sequences for token in ids]]),
            position_ids=positions[None],
            attention_mask=None,
            packed_seq_params=PackedSequences(position_ids=positions, lengths=lengths),
        )
        return out, collect

    with torch.no_grad():
        get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=[iter(packs) for _ in chunks] if many else iter(packs),
            model=chunks,  # pyright: ignore[reportArgumentType]
            num_microbatches=len(packs),
            seq_length=1,
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    return collected
