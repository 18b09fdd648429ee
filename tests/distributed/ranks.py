"""What the rank processes of tests/distributed do: real PolicyRanks over gloo, one a process."""

import traceback
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Job:
    """One layout of one model."""

    model_path: str
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    lr: float = 1e-3
    micro_batch_tokens: int = 60

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data


def serve(pipe: Any, name: str, rank: int, arguments: dict[str, Any]) -> None:
    """Run one function of this file as `rank`; rank 0 first tells the port of the rendezvous, the others hear it."""
    try:
        port = None if rank == 0 else pipe.recv()
        pipe.send(globals()[name](pipe, rank, port, **arguments))
    except BaseException:
        pipe.send(traceback.format_exc())


def _start(pipe: Any, rank: int, port: int | None, job: Job) -> Any:
    from astar_megatron.config import OptimConfig, ParallelConfig
    from astar_megatron.model.policy import PolicyRank

    policy = PolicyRank(
        rank=rank,
        model_path=job.model_path,
        dtype="float32",
        parallel=ParallelConfig(tensor=job.tensor, pipeline=job.pipeline, data=job.data),
        optim=OptimConfig(lr=job.lr, clip_grad=0.0, weight_decay=0.1),
        seed=0,
    )
    if rank == 0:
        port = policy.listen("127.0.0.1")
        pipe.send(port)
    assert port is not None
    policy.start("127.0.0.1", port)
    return policy


def _options(job: Job, size: int) -> Any:
    from astar_megatron.types import StepOptions

    return StepOptions(beta2=0.05, temperature=0.8, mini_batch_size=size, micro_batch_tokens=job.micro_batch_tokens)


def gradients(pipe: Any, rank: int, port: int | None, *, job: Job, batch: Any, folder: str, shared: str) -> Any:
    """Take one step and write the gradient under HF names to `folder`; return the statistics."""
    policy = _start(pipe, rank, port, job)
    try:
        stats = policy.step(batch, _options(job, len(batch)))
        if job.data == 1:  # with more, each rank holds the reduced gradient of its own shard only
            policy.export(folder, shared, kind="gradients")
        return stats
    finally:
        policy.close()


def logprobs(pipe: Any, rank: int, port: int | None, *, job: Job, token_ids: Any, prompt_tokens: Any) -> Any:
    """Return the response tokens' log-probs under the policy."""
    policy = _start(pipe, rank, port, job)
    try:
        return policy.logprobs(token_ids, prompt_tokens)
    finally:
        policy.close()


def steps(pipe: Any, rank: int, port: int | None, *, job: Job, batches: Any, load: str | None, save: str | None) -> Any:
    """Train on `batches`, from the checkpoint `load` and saving to `save` where given; return the statistics."""
    policy = _start(pipe, rank, port, job)
    try:
        if load:
            policy.load(load, batches[0].version)
        found = [policy.step(batch, _options(job, len(batch) // 2)) for batch in batches]
        if save:
            policy.save(save, {"step": len(batches)})
        return found
    finally:
        policy.close()


def loaded_by_megatron(pipe: Any, rank: int, port: int | None, *, job: Job, folder: str) -> list[str]:
    """Let megatron load a checkpoint's weights over zeros; return the parameters that are not the HF folder's."""
    import torch
    from megatron.core import dist_checkpointing

    policy = _start(pipe, rank, port, job)
    try:
        wanted = {name: weight.clone() for name, weight in policy.weights().items()}
        for weight in policy.weights().values():
            weight.zero_()
        state = policy._part.sharded_state_dict()
        policy._part.load_state_dict(dist_checkpointing.load(state, folder))
        found = policy.weights()
        rows = {name: _real_rows(policy, name) for name in wanted}
        return [name for name in wanted if not torch.equal(found[name][: rows[name]], wanted[name][: rows[name]])]
    finally:
        policy.close()


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
    policy = _start(pipe, rank, port, job)
    try:
        for batch in batches:
            policy.step(batch, _options(job, len(batch)))
        policy.save(save, {"step": len(batches)})
        policy.export(folder, shared)
    finally:
        policy.close()
