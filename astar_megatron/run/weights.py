"""WeightSync: the one place where weights move from the policy to the engines; LoadedWeights: what these begin with.

Planned once from the two layouts; in each publish the policy packs its tiles into buckets while every engine takes them
over, in vLLM's order pause, update, finish(version), resume, with the prefix cache dropped. By which way the buckets go
follows from where ranks and workers are: conversion/transfer/route.py.

Before the first publish engines hold what vLLM loaded, by its own choice of files and in its own way; that these are
the weights of the folder is proved with the same digests, before anything is drawn.
"""

import dataclasses
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

import torch

from astar_megatron.cluster.cores import available_cores
from astar_megatron.cluster.policy_group import PolicyGroup
from astar_megatron.cluster.session import remove_shared_folders
from astar_megatron.config import ConversionConfig
from astar_megatron.data.files import exclusive
from astar_megatron.rollout.pool import EnginePool
from conversion import hf
from conversion.families import Model, read_model
from conversion.folders import ModelFolderError
from conversion.plan import WeightMismatch, plan
from conversion.transfer.route import Route, choose, here
from conversion.verify import Holdings, Manifest, Part, Verifier, mismatch, sent_parts

_SHARED_MEMORY = Path("/dev/shm")
_PREFIX = "astar-"
_LOCK = "lock"  # held while the run lives: pids mean nothing to a container that shares this memory


class TransferFolder:
    """A folder in shared memory that lives as long as the run. A context manager."""

    def __init__(self) -> None:
        remove_shared_folders()
        self.path = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=_SHARED_MEMORY))
        self._lock = exclusive(self.path / _LOCK, "this run")

    def __enter__(self) -> Self:
        self._lock.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.__exit__(None, None, None)


class WeightSync:
    """Carries the policy's weights to every engine of a pool, and proves that they arrived.

    `reason` says in words by which way, and why. Shared memory is made in `folder`.
    After each publish the digests of what every worker holds are compared with those of what the policy holds.
    """

    def __init__(
        self, policy: PolicyGroup, engines: EnginePool, model: Model, folder: Path, cfg: ConversionConfig
    ) -> None:
        self._policy, self._engines = policy, engines
        weight_plan = plan(model.megatron_tiles(policy.layout), model.vllm_tiles(engines.tensor))
        self._verifier = Verifier(weight_plan, getattr(torch, policy.dtype))
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
        self._engines.update(version, self._policy.begin_publish(version))
        expected = self._verifier.manifest(version, self._policy.digests())
        _check_held(self._engines, self._verifier, expected, self._policy.digest_rows)


class LoadedWeights:
    """What engines must hold that loaded a Hugging Face folder by themselves: the digests of its files.

    Construction reads the files, once, as threads for each core can, and needs no engine: so it can be done while the
    engines start. `tensor` and `dtype` are the engines'. Raises ModelFolderError as hf.check does.
    """

    def __init__(self, folder: str | Path, tensor: int, dtype: str) -> None:
        self._folder, self._dtype = Path(folder), dtype
        self._model = read_model(folder)
        weight_plan = plan(self._model.hf_tiles(), self._model.vllm_tiles(tensor))
        self._verifier = Verifier(weight_plan, getattr(torch, dtype))
        self._parts = sent_parts(weight_plan, 0)
        self._places = hf.check(self._folder, self._model.parameters())
        with ThreadPoolExecutor(max(1, int(available_cores()))) as threads:
            digests = list(threads.map(lambda part: self._in_file(part).digests()[0], self._parts))
        self._expected = self._verifier.manifest(0, [digests])

    def verify(self, engines: EnginePool) -> None:
        """Raise ModelFolderError, naming the first parameter that an engine does not hold as the folder has it."""
        engines.open_audit(self._model.config, self._dtype)
        try:
            _check_held(
                engines, self._verifier, self._expected, lambda _, index: self._in_file(self._parts[index]).rows(0)
            )
        except WeightMismatch as error:
            file = self._places[error.tensor].file if error.tensor in self._places else "its file"
            raise ModelFolderError(
                f"{self._folder}: {error.where} loaded another {error.tensor} than {file} holds, first bad row "
                f"{error.row}: {error.detail}. vLLM has read other files, or these in another way: leave nothing but "
                "the model in the folder, and report this if that changes nothing"
            ) from None

    def _in_file(self, part: Part) -> Holdings:
        tensor = hf.rows(self._folder, self._places[part.hf])
        return Holdings([part], {part.piece.name: tensor}, getattr(torch, self._dtype))


def _check_held(
    engines: EnginePool, verifier: Verifier, expected: Manifest, sent_rows: Callable[[int, int], list[int]]
) -> None:
    """Raise WeightMismatch where a worker does not hold what is expected; `sent_rows` as in PolicyGroup.digest_rows."""
    version = expected.version
    for engine, workers in enumerate(engines.audit(version)):
        for worker, answer in enumerate(workers):
            where = f"worker {worker} of engine {engine}"
            index = verifier.first_mismatch(expected, worker, answer["digests"])
            if index is not None:
                sent = sent_rows(*verifier.origin(worker, index))
                held_rows = engines.digest_rows(engine, worker, index)
                raise mismatch(version, verifier.target_parts[worker][index], where, sent, held_rows)
            for tensor, row, detail in answer["faults"]:
                raise WeightMismatch(version=version, tensor=tensor, where=where, row=row, detail=detail)
