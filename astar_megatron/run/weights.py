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
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

import torch

from astar_megatron.cluster.cores import available_cores
from astar_megatron.cluster.errors import ClusterError
from astar_megatron.cluster.policy_group import PolicyGroup
from astar_megatron.cluster.session import LOCK, PREFIX, SHARED_MEMORY, remove_shared_folders
from astar_megatron.config import ConversionConfig
from astar_megatron.data.files import exclusive
from astar_megatron.rollout.member import Member
from astar_megatron.rollout.pool import EnginePool
from conversion import hf
from conversion.families import Model, read_model
from conversion.folders import ModelFolderError
from conversion.ledger import listed, num_not_finite
from conversion.plan import WeightMismatch, plan
from conversion.transfer.route import Route, choose, here
from conversion.verify import Holdings, Manifest, Part, Verifier, mismatch, sent_parts

_MOST_ATTEMPTS = 3  # to publish one version


class TransferFolder:
    """A folder in shared memory that lives as long as the run. A context manager."""

    def __init__(self) -> None:
        remove_shared_folders()
        self.path = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=SHARED_MEMORY))
        self._lock = exclusive(self.path / "new", "another run")

    def __enter__(self) -> Self:
        # It gets its name once it is held: a run that starts at this instant would take it for a killed run's.
        self._lock.__enter__()
        (self.path / "new").rename(self.path / LOCK)
        return self

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.__exit__(None, None, None)


class WeightSync:
    """Carries the policy's weights to the engines of a pool, and proves that they arrived.

    `reason` says in words by which way, and why. Shared memory is made in `folder`.
    After each publish the digests of what every worker holds are compared with those of what the policy holds.
    """

    def __init__(
        self, policy: PolicyGroup, engines: EnginePool, model: Model, folder: Path, cfg: ConversionConfig
    ) -> None:
        self._policy, self._engines, self._model, self._folder, self._cfg = policy, engines, model, folder, cfg
        tiles = model.megatron_tiles(policy.layout, policy.layout.senders())
        self._plan = plan(tiles, model.vllm_tiles(engines.tensor))
        self._verifier = Verifier(self._plan)
        self._receivers: list[Member] = []  # those that the senders are open for
        self.sent: tuple[tuple[int, ...], ...] = ()  # the digests of what was published last
        self._open(engines.running())

    def publish(self, version: int, members: Sequence[Member] | None = None) -> None:
        """Give engines (none named: all that run) the policy's current weights; their rollouts now carry `version`.

        An engine that ends meanwhile is left out: the pool replaces it, and one that does not take them. When the
        others then could not go on either, it is tried again without it. Raises WeightMismatch if a worker does not
        hold the weights in the end, ClusterError where one named does not take them.
        """
        behind, senders = list(self._engines.running() if members is None else members), self._verifier.senders
        for _ in range(_MOST_ATTEMPTS):
            if not behind:
                return
            have: list[Member] = []
            if self._receivers == behind or self._open(behind):
                have = self._engines.update(version, behind, self._policy.begin_publish(version, senders))
            if have:
                digests = self._policy.digests(senders)
                self.sent = tuple(map(tuple, digests.values()))
                expected = self._verifier.manifest(version, digests)
                proved = _check_held(self._engines, have, self._verifier, expected, self._policy.digest_rows)
                self._engines.serve(proved)
            if len(have) < len(behind):
                self._receivers = []  # whoever waited for one that failed has given up
            left = set(self._engines.running()).difference(have)
            behind = [member for member in behind if member in left]
        for member in behind:
            cause = f"engine {member.index} did not take version {version} in {_MOST_ATTEMPTS} attempts"
            if members is not None:  # one that has taken another's place
                raise ClusterError(f"publish: {cause}; the lines above say of what it failed")
            self._engines.replace(member, cause)

    def close(self) -> None:
        """Forget who is open for whom: the ranks are others now. The next publish opens them."""
        self._receivers = []

    def _open(self, members: list[Member]) -> bool:
        """Let the ranks send to these engines and to no other; False if one of them has ended."""
        sources, workers = self._policy.places(), self._engines.places(members)
        links = {(copy.source.rank, copy.target.rank) for copy in self._plan.copies}
        way, self.reason = choose(sources, workers, links, here(torch.device("cpu")).memory)
        host, port = self._policy.rendezvous
        route = Route(
            way=way,
            num_sources=len(sources),
            num_engines=len(members),
            num_workers=self._engines.tensor,
            folder=str(self._folder),
            host=host,
            port=port,
            name=f"publish-{uuid.uuid4().hex}",
            bucket_bytes=self._cfg.bucket_bytes,
            timeout_seconds=self._engines.stall_seconds,
        )
        self._policy.open_publish(route)
        is_open = self._engines.open_update(
            {
                "config": self._model.config,
                "layout": dataclasses.asdict(self._policy.layout),
                "dtype": self._policy.dtype,
                "route": dataclasses.asdict(route),
            },
            members,
        )
        self._receivers = members if is_open else []
        return is_open


class LoadedWeights:
    """What engines must hold that loaded a Hugging Face folder by themselves: the digests of its files.

    Construction reads the files, once, as threads for each core can, and needs no engine: so it can be done while the
    engines start. `tensor` and `dtype` are the engines'. Raises ModelFolderError as hf.check does, and
    where a weight is not finite: all that is drawn and learnt would be NaN.
    """

    def __init__(self, folder: str | Path, tensor: int, dtype: str) -> None:
        self._folder, self._dtype = Path(folder), dtype
        self._model = read_model(folder)
        weight_plan = plan(self._model.hf_tiles(), self._model.vllm_tiles(tensor))
        self._verifier = Verifier(weight_plan)
        self._parts = sent_parts(weight_plan, 0)
        self._places = hf.check(self._folder, self._model.parameters())
        with ThreadPoolExecutor(max(1, int(available_cores()))) as threads:
            bad = dict(zip(self._places, threads.map(self._num_not_finite, self._places.values()), strict=True))
            if any(bad.values()):
                raise ModelFolderError(
                    f"{self._folder}: {listed(Counter(bad))}: such a model computes nothing; copy the "
                    "weights again, or take another model"
                )
            digests = list(threads.map(lambda part: self._in_file(part).digests()[0], self._parts))
        self._expected = self._verifier.manifest(0, {0: digests})

    def verify(self, engines: EnginePool, members: Sequence[Member] | None = None) -> None:
        """Let engines (none named: all that run) draw with what they hold, which is what the folder has.

        Raises ModelFolderError, naming the first parameter that one does not hold so.
        """
        members = engines.running() if members is None else members
        engines.open_audit(self._model.config, self._dtype, members)
        try:
            proved = _check_held(
                engines,
                members,
                self._verifier,
                self._expected,
                lambda _, index: self._in_file(self._parts[index]).rows(0),
            )
            engines.serve(proved)
        except WeightMismatch as error:
            file = self._places[error.tensor].file if error.tensor in self._places else "its file"
            raise ModelFolderError(
                f"{self._folder}: {error.where} loaded another {error.tensor} than {file} holds, first bad row "
                f"{error.row}: {error.detail}. vLLM has read other files, or these in another way: leave nothing but "
                "the model in the folder, and report this if that changes nothing"
            ) from None

    def _num_not_finite(self, place: hf.Stored) -> int:
        return num_not_finite(hf.rows(self._folder, place))

    def _in_file(self, part: Part) -> Holdings:
        tensor = hf.rows(self._folder, self._places[part.hf])
        return Holdings([part], {part.piece.name: tensor}, getattr(torch, self._dtype))


def _check_held(
    engines: EnginePool,
    members: Sequence[Member],
    verifier: Verifier,
    expected: Manifest,
    sent_rows: Callable[[int, int], list[int]],
) -> list[Member]:
    """Return the engines that hold what is expected: all of `members` that have not ended meanwhile.

    Raises WeightMismatch where a worker does not; `sent_rows` as in PolicyGroup.digest_rows.
    """
    version = expected.version
    answers = engines.audit(version, members)
    for member, workers in answers.items():
        for worker, answer in enumerate(workers):
            where = f"worker {worker} of engine {member.index}"
            index = verifier.first_mismatch(expected, worker, answer["digests"])
            if index is not None:
                sent = sent_rows(*verifier.origin(worker, index))
                held_rows = engines.digest_rows(member, worker, index)
                raise mismatch(version, verifier.target_parts[worker][index], where, sent, held_rows)
            for tensor, row, detail in answer["faults"]:
                raise WeightMismatch(version=version, tensor=tensor, where=where, row=row, detail=detail)
    return list(answers)
