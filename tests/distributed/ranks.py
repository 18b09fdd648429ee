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


def head_errors(pipe: Any, rank: int, port: int | None, *, head: str, case: Any, num_ranks: int) -> Any:
    """Return how far a head is from float64, and scoring from training, when ranks share the vocabulary."""
    import head_cases
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", port or 0, is_master=rank == 0, wait_for_workers=False)  # type: ignore[attr-defined]
    if rank == 0:
        pipe.send(store.port)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
    try:
        share: Any = {"rank": rank, "num_ranks": num_ranks, "group": dist.group.WORLD}
        return head_cases.errors(head, case, **share), head_cases.scoring_gap(head, case, **share)
    finally:
        dist.destroy_process_group()


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
