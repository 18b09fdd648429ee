"""WeightSync: the one place where weights move from the policy to the engines.

Planned once from the two layouts; in each publish the policy packs its tiles into buckets while every engine takes them
over, in vLLM's order pause, update, finish(version), resume, with the prefix cache dropped. By which way the buckets go
follows from where ranks and workers are: conversion/transfer/route.py.
"""

import contextlib
import dataclasses
import os
import shutil
import tempfile
import uuid
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from astar_megatron.cluster.policy_group import PolicyGroup
from astar_megatron.config import ConversionConfig
from astar_megatron.data.files import exclusive
from astar_megatron.rollout.pool import EnginePool
from conversion.families import Model
from conversion.plan import WeightMismatch, plan
from conversion.transfer.route import Route, choose, here
from conversion.verify import Verifier, mismatch

_SHARED_MEMORY = Path("/dev/shm")
_PREFIX = "astar-"
_FULL_CHECKS = 3  # the first publishes: what is wrong with a layout shows at once
_LOCK = "lock"  # held while the run lives: pids mean nothing to a container that shares this memory


class TransferFolder:
    """A folder in shared memory that lives as long as the run. A context manager."""

    def __init__(self) -> None:
        remove_left_behind()
        self.path = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=_SHARED_MEMORY))
        self._lock = exclusive(self.path / _LOCK, "this run")

    def __enter__(self) -> Self:
        self._lock.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.__exit__(None, None, None)


def remove_left_behind() -> None:
    """Remove the folders of runs that were killed before they could; a living run holds the lock in its folder."""
    for folder in _SHARED_MEMORY.glob(f"{_PREFIX}*-*"):
        with contextlib.suppress(OSError):  # held, of another user, or just removed
            if (folder / _LOCK).stat().st_uid == os.getuid():
                with exclusive(folder / _LOCK, "another run"):
                    shutil.rmtree(folder, ignore_errors=True)


class WeightSync:
    """Carries the policy's weights to every engine of a pool, and proves that they arrived.

    `reason` says in words by which way, and why. Shared memory is made in `folder`.
    After each publish the digests of what every worker holds are compared with those of what the policy holds: all rows
    in the first three publishes and every `verify_interval`-th, a sample in the others.
    """

    def __init__(
        self, policy: PolicyGroup, engines: EnginePool, model: Model, folder: Path, cfg: ConversionConfig
    ) -> None:
        self._policy, self._engines, self._cfg = policy, engines, cfg
        weight_plan = plan(model.megatron_tiles(policy.layout), model.vllm_tiles(engines.tensor))
        self._verifier = Verifier(weight_plan, getattr(torch, policy.dtype))
        self._count = 0
        sources, workers = policy.places(), engines.places()
        links = {(copy.source.rank, copy.target.rank) for copy in weight_plan.copies}
        way, self.reason = choose(sources, workers, links, here(torch.device("cpu")).memory)
        host, port = policy.rendezvous
        route = Route(
            way=way,
            num_sources=len(sources),
            num_engines=len(engines),
            num_workers=engines.tensor,
            folder=str(folder),
            host=host,
            port=port,
            name=f"publish-{uuid.uuid4().hex}",
            bucket_bytes=cfg.bucket_bytes,
        )
        policy.open_publish(route)
        engines.open_update(
            {
                "config": model.config,
                "layout": dataclasses.asdict(policy.layout),
                "dtype": policy.dtype,
                "route": dataclasses.asdict(route),
            }
        )

    def publish(self, version: int) -> None:
        """Give every engine the policy's current weights; rollouts drawn from now on carry `version`.

        Raises WeightMismatch if a worker then does not hold them.
        """
        full = self._count < _FULL_CHECKS or self._count % self._cfg.verify_interval == 0
        self._count += 1
        self._engines.update(version, self._policy.begin_publish(version))
        self._verify(version, full)

    def _verify(self, version: int, full: bool) -> None:
        expected = self._verifier.manifest(version, full, self._policy.digests(version, full))
        for engine, workers in enumerate(self._engines.audit(version, full)):
            for worker, answer in enumerate(workers):
                where = f"worker {worker} of engine {engine}"
                index = self._verifier.first_mismatch(expected, worker, answer["digests"])
                if index is not None:
                    sent = self._policy.digest_rows(*self._verifier.origin(worker, index))
                    held = self._engines.digest_rows(engine, worker, index)
                    raise mismatch(version, self._verifier.held[worker][index], where, sent, held)
                for tensor, row, detail in answer["faults"]:
                    raise WeightMismatch(version=version, tensor=tensor, where=where, row=row, detail=detail)
