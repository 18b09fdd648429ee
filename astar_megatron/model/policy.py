"""One Megatron rank of the policy: built, loaded, trained, published, saved. Runs inside one process of its own.

`PolicyRank` is plain Python; cluster/ makes one Ray actor of it for every rank. Methods marked collective must be
called on all ranks at once. Each rank derives the same micro-batches from the same batch, so no plan is exchanged.

Shapes: B sequences of a step.
"""

import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from astar_megatron.algorithm.objective import Loss
from astar_megatron.config import Offload
from astar_megatron.data.manifest import FileDigest
from astar_megatron.data.run_folder import step_name
from astar_megatron.model import backend as backends
from astar_megatron.model import checkpoint
from astar_megatron.model.build import (
    build,
    initialise,
    named_parameters,
    overlaps,
    transformer_config,
)
from astar_megatron.model.critic import Critic
from astar_megatron.model.dither import dither_masters
from astar_megatron.model.forward import run_scoring
from astar_megatron.model.layouts import layout_of
from astar_megatron.model.learning import Dither, Learning, make_learning
from astar_megatron.model.micro_batches import packed_for
from astar_megatron.model.optimizer import describe
from astar_megatron.model.options import PolicyOptions
from astar_megatron.model.parking import Parking, forget_fp8_copies, gradient_buffers, optimizer_tensors
from astar_megatron.model.profiles import write_trace
from astar_megatron.model.publishing import Publishing, RankWeights, export, export_route, open_publish
from astar_megatron.model.reference import Reference
from astar_megatron.model.saving import Saving
from astar_megatron.model.step import Learner
from astar_megatron.types import RolloutBatch, SaveState, StepOptions, StepStats, Trace
from conversion import hf
from conversion.families import read_model
from conversion.megatron import check_tensors
from conversion.plan import plan
from conversion.transfer.route import Place, Route, here

_COLLECTIVE_TIMEOUT = timedelta(minutes=30)


class PolicyRank:
    """This rank's shards of policy, reference and optimizer, and of a critic where one learns."""

    def __init__(self, rank: int, options: PolicyOptions) -> None:
        self.backend = backends.choose()
        self.rank = rank
        self.model = read_model(options.model_path)
        self.layout = layout_of(options.parallel, fused_norms=self.backend.uses_transformer_engine)
        self._options, self._dtype = options, getattr(torch, options.dtype)
        self._dithers = options.optim.dither and self._dtype == torch.bfloat16
        self._version = 0  # batches behind the current weights
        self._store: TCPStore | None = None
        self._rendezvous = ("", 0)
        self._num_exports = 0
        self._publishing: Publishing | None = None
        self._saving: Saving | None = None
        self._profiler: torch.profiler.profile | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def listen(self, host: str) -> int:
        """Open the rendezvous of all ranks on a free port of `host` and return the port. Rank 0 only."""
        listener = socket.create_server((host, 0))  # the store's own would listen on all interfaces
        port = listener.getsockname()[1]
        self._store = TCPStore(
            host,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=_COLLECTIVE_TIMEOUT,
            master_listen_fd=listener.detach(),
        )
        return port

    def start(self, host: str, port: int) -> str:
        """Join the other ranks, build the model and load its Hugging Face weights; collective.

        Returns in words what the rank runs on.
        """
        self._rendezvous = (host, port)
        store = self._store or TCPStore(host, port, is_master=False, timeout=_COLLECTIVE_TIMEOUT)
        dist.init_process_group(
            self.backend.collectives,
            store=store,
            rank=self.rank,
            world_size=self.layout.world_size,
            timeout=_COLLECTIVE_TIMEOUT,
        )
        initialise(self.layout)
        tensor_parallel.model_parallel_cuda_manual_seed(self._options.seed + 1)
        self._build()
        unfused = self.backend.unfused_attention(self._dtype)
        attention = f"; attention is unfused, its memory by the square of the length: {unfused}" if unfused else ""
        dithered = "; master weights dithered within what rounds to bfloat16's" if self._dithers else ""
        return f"{self.backend.describe()}{attention}; {describe(self._learning.optimizer)}{dithered}"

    def _build(self) -> None:
        options, config = self._options, self._config()
        chunks = build(self.model, self.layout, config, self.backend)
        tensors = _tensors(chunks)
        check_tensors(self.model, self.layout, self.rank, tensors)
        own = plan(self.model.hf_tiles(), self.model.megatron_tiles(self.layout, {*self.layout.senders(), self.rank}))
        hf.load(options.model_path, own, self.rank, tensors)
        offload = options.reference == "offload"
        self._reference = Reference(self.model, self.layout, self.rank, config, tensors, self.backend, offload=offload)
        self._learning = make_learning(
            chunks, config, options.optim, options.optimizer_steps, self._dither(options.seed), overlap=overlaps()
        )
        self._critic = None if options.critic_lr is None else self._make_critic(options.critic_lr)
        self._parking = Parking(self.backend.device, self.weights().values())
        self._learner = Learner(self.model, self.layout, self.backend, self._learning, self._reference, self._critic)

    def _config(self) -> TransformerConfig:
        """Return Megatron's description of a model of the policy's kind, for one model only."""
        options = self._options
        return transformer_config(
            self.model, self.layout, self._dtype, self.backend, recompute=options.parallel.recompute, fp8=options.fp8
        )

    def _dither(self, seed: int) -> Dither | None:
        """Return what dithers the masters of a new optimizer; None where they are the weights."""
        if not self._dithers:
            return None
        return partial(dither_masters, model=self.model, layout=self.layout, rank=self.rank, seed=seed)

    def _make_critic(self, lr: float) -> Critic:
        options = self._options
        return Critic(
            self.model,
            self.layout,
            self._config(),
            self.weights(),
            self.backend,
            options.optim.model_copy(update={"lr": lr, "min_lr": 0.0, "schedule": "constant"}),
            options.optimizer_steps,
            self._dither(options.seed + 1),
        )

    @property
    def _critics_learning(self) -> Learning | None:
        return self._critic.learning if self._critic is not None else None

    def step(self, batch: RolloutBatch, loss: Loss, options: StepOptions) -> StepStats | None:
        """Score the reference, then one optimiser step a mini-batch by the mean of its sequences' losses; collective.

        Returns the statistics on the first tensor- and data-parallel rank of the last stage, None elsewhere. A
        mini-batch whose losses or gradient are not finite changes nothing and is named in the statistics.
        """
        if batch.version != self._version:
            raise ValueError(f"policy: rollouts of version {batch.version} for weights of version {self._version}")
        stats = self._learner.step(batch, loss, options, self.weights(), is_first=self._version == 0)
        self._version += 1
        return stats

    def begin_profile(self) -> None:
        """Record all that this rank computes until `end_profile`, which has to be called in the same thread."""
        self._profiler = self.backend.profiler()
        self._profiler.start()

    def end_profile(self, folder: str, step: int) -> Trace:
        """Write what was recorded to `step_<n>_rank_<r>.json.gz` in a folder; a full disk is said, not raised."""
        profiler, self._profiler = _after("begin_profile", self._profiler), None
        profiler.stop()
        return write_trace(profiler.export_chrome_trace, Path(folder) / f"{step_name(step)}_rank_{self.rank}.json.gz")

    def refresh_reference(self) -> None:
        """Make the reference a copy of the policy as it is."""
        self._reference.copy(self.weights())

    def logprobs(self, token_ids: Sequence[Sequence[int]], prompt_tokens: Sequence[int]) -> list[list[float]] | None:
        """Return each response token's log-prob under the policy (nats), on the last stage; collective."""
        packed = packed_for(token_ids, prompt_tokens, self.layout, self.backend)
        packs = [packed] * (self.layout.pipeline if self.layout.virtual > 1 else 1)
        scores = run_scoring(
            self._learning.modules, packs, vocab_size=self.model.vocab_size, temperature=1.0, backend=self.backend
        )
        forget_fp8_copies(self._learning.modules)  # engines may be awake beside them
        return packed.by_sequence(scores[0]) if scores else None

    def release(self, offload: Offload) -> tuple[int, int]:
        """Give memory back until `resume`: what `offload` names; weights can still be read, published and scored by.

        Returns bytes of tensors that were given back, and bytes that the process still has of the device, 0 on a CPU.
        """
        released, critic = 0, self._critics_learning
        for learning in (self._learning, critic) if critic else (self._learning,):
            if offload in ("optimizer", "all"):
                released += self._parking.park(optimizer_tensors(learning.optimizer))
            if offload == "all":
                released += self._parking.drop(gradient_buffers(learning.modules))
            if offload != "none":
                forget_fp8_copies(learning.modules)
        if offload == "all":
            chunks = [*self._reference.chunks, *(critic.chunks if critic else ())]
            released += self._parking.park(parameter.data for parameter in named_parameters(chunks).values())
        return released, self.backend.release_cache() if offload != "none" else 0

    def resume(self) -> None:
        """Take again what `release` gave back."""
        self._parking.restore()

    def weights(self) -> dict[str, Tensor]:
        """Return this rank's parameters, current and uncopied."""
        return _tensors(self._learning.chunks)

    def _rank_weights(self) -> RankWeights:
        return RankWeights(
            model=self.model, layout=self.layout, rank=self.rank, tensors=self.weights(), dtype=self._dtype
        )

    def place(self) -> Place:
        """Return where this rank's weights are."""
        return here(self.backend.device)

    def open_publish(self, route: Route) -> None:
        """Prepare to send this rank's tiles by `route`, and no other, to engines of `route.num_workers` workers."""
        if self._publishing is not None:
            self._publishing.sender.close()
        self._publishing = open_publish(self._rank_weights(), route)

    def publish(self, version: int) -> None:
        """Send the current weights; the engines must be receiving, or about to."""
        _after("open_publish", self._publishing).sender.send(version)

    def digests(self) -> list[int]:
        """Return the digests of what this rank publishes, computed from its parameters: conversion/verify.py."""
        return _after("open_publish", self._publishing).holdings.digests()

    def digest_rows(self, index: int) -> list[int]:
        """Return the digests of the rows of part `index` of what this rank publishes."""
        return _after("open_publish", self._publishing).holdings.rows(index)

    def begin_save(self, folder: str) -> dict[str, Any]:
        """Begin to write everything that training needs to go on exactly to an empty folder; collective.

        Returns what `load` needs to find in its progress.json. Raises StorageError on all ranks.
        """
        critic = self._critics_learning
        self._saving = checkpoint.begin_save(Path(folder), self._learning, self._reference, critic, self._writer)
        return checkpoint.described(self._reference) | {"dtype": self._options.dtype}

    def save_state(self, wait: bool = False) -> SaveState:
        """Return how far this rank is with the checkpoint that was begun last; with `wait` when it is through."""
        return _after("begin_save", self._saving).state(wait=wait)

    def finish_save(self) -> dict[str, FileDigest]:
        """Make the folder a checkpoint that Megatron and `astar convert` read; collective, all ranks have written.

        Returns the digests of the files that this rank wrote before. Raises StorageError on rank 0.
        """
        digests = _after("begin_save", self._saving).finish(Path(self._options.model_path))
        self._saving = None
        return digests

    def load(self, folder: str, version: int) -> None:
        """Restore what was saved after `version` batches, in any layout; collective."""
        checkpoint.load(Path(folder), self._learning, self._reference, self._critics_learning)
        self._version = version

    def export(self, folder: str, transfer_folder: str) -> None:
        """Write the weights as a Hugging Face folder; collective, rank 0 writes: publishing.export."""
        self._num_exports += 1
        route = export_route(transfer_folder, self._rendezvous, self._num_exports)
        model_folder = self._options.model_path
        export(self._rank_weights(), route, folder, model_folder=model_folder, version=self._version)

    def close(self) -> None:
        """Leave the group and remove the files of publishing."""
        if self._publishing is not None:
            self._publishing.sender.close()
        if dist.is_initialized():
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()


def _tensors(chunks: Sequence[GPTModel]) -> dict[str, Tensor]:
    return {name: parameter.data for name, parameter in named_parameters(chunks).items()}


def _after[T](call: str, begun: T | None) -> T:
    """Return what `call` began."""
    assert begun is not None, f"{call} comes first"
    return begun
