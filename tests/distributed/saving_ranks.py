"""What rank processes do while a checkpoint of theirs is written."""

import hashlib
import resource
from pathlib import Path
from threading import Event
from typing import Any

import ranks as work
from training import _digest


def written_late(
    pipe: Any, rank: int, port: int | None, *, job: Any, batches: Any, folder: str, fill: str
) -> tuple[list[str], str]:
    """Save after the first batch, train on all others, and only then let the write begin.

    Returns the digests of the state after each batch, and why the write failed. With `fill` this file takes what is
    free on the disk before it begins.
    """
    with work.started(pipe, rank, port, job) as policy:
        may_write, digests = Event(), []
        for batch in batches:
            policy.step(batch, job.loss, work._options(job, len(batch)))
            policy.refresh_reference()  # in place: unlike the policy's, its tensors are no views, which Megatron copies
            digests.append(state_of(policy))
            if len(digests) == 1:
                policy._writer.submit(may_write.wait)
                made = begun(policy, folder)
                assert not policy.save_state().done and not list(Path(folder).iterdir())
        if fill and rank == 0:
            fill_disk(Path(fill))
        work.all_here()
        may_write.set()
        return digests, ended(policy, folder, made)


def begun(policy: Any, folder: str) -> dict[str, Any]:
    if policy.rank == 0:
        Path(folder).mkdir(parents=True)
    work.all_here()
    return policy.begin_save(folder)


def ended(policy: Any, folder: str, made: dict[str, Any]) -> str:
    """Complete the checkpoint; return why this rank could not write, and complete nothing where it could not."""
    state = policy.save_state(wait=True)
    assert state == policy.save_state()
    if not state.problem:
        work.complete(policy, folder, made)
    return state.problem


def fill_disk(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass


def without_room(
    pipe: Any, rank: int, port: int | None, *, job: Any, batch: Any, folder: str, limit_bytes: int | None
) -> tuple[str, str, str]:
    """Try to save where there is no room: on a small disk, or with files limited to `limit_bytes`.

    Returns the problem, and digests of the state before and after.
    """
    with work.started(pipe, rank, port, job) as policy:
        policy.step(batch, job.loss, work._options(job, len(batch)))
        before = _digest(policy)
        if limit_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, resource.RLIM_INFINITY))
        try:
            begun(policy, folder)
            problem = policy.save_state(wait=True).problem
        except OSError as error:
            problem = f"{type(error).__name__}: {error}"
        return problem, before, _digest(policy)


def loaded(pipe: Any, rank: int, port: int | None, *, job: Any, folder: str) -> str:
    """Return the digest of the state that a checkpoint after one batch holds."""
    with work.started(pipe, rank, port, job) as policy:
        policy.load(folder, 1)
        return state_of(policy)


def refused(pipe: Any, rank: int, port: int | None, *, job: Any, folder: str) -> str:
    """Return why a checkpoint after one batch can't be loaded, or nothing."""
    with work.started(pipe, rank, port, job) as policy:
        try:
            policy.load(folder, 1)
        except ValueError as error:
            return str(error)
        return ""


def saved_with_a_class(pipe: Any, rank: int, port: int | None, *, job: Any, batch: Any, folder: str) -> str:
    """Save after a step of an optimizer in whose groups a class stands, as with `optim.offload`; return the digest."""
    import torch

    with work.started(pipe, rank, port, job) as policy:
        policy.step(batch, job.loss, work._options(job, len(batch)))
        for optimizer in policy._learning.optimizer.chained_optimizers:
            for group in optimizer.optimizer.param_groups:
                group["cpu_optimizer_cls"] = torch.optim.AdamW
        assert not ended(policy, folder, begun(policy, folder))
        return state_of(policy)


def loaded_without_a_piece(pipe: Any, rank: int, port: int | None, *, job: Any, folder: str) -> str:
    """Load a checkpoint after one batch where rank 1 has no part of any parameter; return the digest of the rest.

    So it is with an optimizer of few parameters over many data-parallel ranks.
    """
    with work.started(pipe, rank, port, job) as policy:
        if rank == 1:
            for optimizer in policy._learning.optimizer.chained_optimizers:
                optimizer.model_param_gbuf_map = {}
                for of_dtype in optimizer.gbuf_ranges:
                    for buckets in of_dtype.values():
                        for bucket in buckets:
                            bucket["param_map"].clear()
        policy.load(folder, 1)
        return state_of(policy)


def state_of(policy: Any) -> str:
    """Return digests of weights, optimiser and schedule, and of the reference."""
    reference = hashlib.sha256()
    for chunk in policy._reference.chunks:
        for parameter in chunk.parameters():
            reference.update(parameter.detach().float().numpy().tobytes())
    return f"{_digest(policy)} {reference.hexdigest()}"
