"""One Megatron rank of the policy: built, loaded, trained, published, saved. Runs inside one process of its own.

`PolicyRank` is plain Python; cluster/ makes one Ray actor of it for every rank. Methods marked collective must be
called on all ranks at once. Each rank derives the same micro-batches from the same batch, so no plan is exchanged.

Shapes: B sequences of a step.
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from astar_megatron.algorithm.loss import astar_loss
from astar_megatron.algorithm.packing import PackedBatch, micro_batches, pack, split_evenly
from astar_megatron.config import OptimConfig, ParallelConfig
from astar_megatron.model import backend as backends
from astar_megatron.model import checkpoint
from astar_megatron.model.build import build, in_compute_type, transformer_config
from astar_megatron.model.export_check import check_export
from astar_megatron.model.forward import run_loss, run_scoring
from astar_megatron.model.reference import Reference
from astar_megatron.model.statistics import StepRecord
from astar_megatron.types import RolloutBatch, StepOptions, StepStats
from conversion import hf
from conversion.families import read_model
from conversion.megatron import check_tensors
from conversion.plan import plan
from conversion.tiles import ParallelLayout
from conversion.transfer.shared_memory import SharedMemoryReceiver, SharedMemorySender
from conversion.verify import Holdings, sent_parts

_COLLECTIVE_TIMEOUT = timedelta(minutes=30)


class PolicyRank:
    """This rank's shards of policy, reference and optimizer.

    `dtype` is "bfloat16" or "float32"; master weights and gradients are float32 either way.
    """

    def __init__(
        self, *, rank: int, model_path: str, dtype: str, parallel: ParallelConfig, optim: OptimConfig, seed: int
    ) -> None:
        self.backend = backends.choose()
        self.rank = rank
        self.model = read_model(model_path)
        self.layout = ParallelLayout(
            tensor=parallel.tensor,
            pipeline=parallel.pipeline,
            data=parallel.data,
            fused_norms=self.backend.uses_transformer_engine,
        )
        self._path, self._dtype, self._optim, self._seed = model_path, getattr(torch, dtype), optim, seed
        self._version = 0  # batches behind the current weights
        self._store: TCPStore | None = None
        self._sender: SharedMemorySender | None = None
        self._holdings: Holdings | None = None

    def listen(self, host: str) -> int:
        """Open the rendezvous of all ranks on a free port of `host` and return the port. Rank 0 only."""
        self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=_COLLECTIVE_TIMEOUT)
        return self._store.port

    def start(self, host: str, port: int) -> str:
        """Join the other ranks, build the model and load its Hugging Face weights; collective.

        Returns in words what the rank runs on.
        """
        store = self._store or TCPStore(host, port, is_master=False, timeout=_COLLECTIVE_TIMEOUT)
        dist.init_process_group(
            self.backend.collectives,
            store=store,
            rank=self.rank,
            world_size=self.layout.world_size,
            timeout=_COLLECTIVE_TIMEOUT,
        )
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=self.layout.tensor,
            pipeline_model_parallel_size=self.layout.pipeline,
            create_gloo_process_groups=False,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(self._seed + 1)
        self._build()
        return self.backend.reason

    def _build(self) -> None:
        config = transformer_config(self.model, self.layout, self._dtype, self.backend)
        part = build(self.model, self.layout, config, self.backend)
        tensors = {name: parameter.data for name, parameter in part.named_parameters()}
        check_tensors(self.model, self.layout, self.rank, tensors)
        hf.load(self._path, plan(self.model.hf_tiles(), self.model.megatron_tiles(self.layout)), self.rank, tensors)
        self._reference = Reference(self.model, self.layout, config, tensors, self.backend)
        self._part = part
        self._module = DistributedDataParallel(
            config=config,
            ddp_config=DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=True,
                check_for_nan_in_grad=True,  # raises before the optimizer's step could spoil the weights
            ),
            module=in_compute_type(part, config),
        )
        optim = self._optim
        self._optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=optim.lr,
                min_lr=optim.lr,
                weight_decay=optim.weight_decay,
                adam_beta1=optim.adam_beta1,
                adam_beta2=optim.adam_beta2,
                adam_eps=optim.adam_eps,
                clip_grad=optim.clip_grad,
                bf16=config.bf16,
                params_dtype=self._dtype,
                use_distributed_optimizer=True,
            ),
            [self._module],
            use_gloo_process_groups=False,
        )
        self._schedule = _constant_schedule(self._optimizer, optim)
        config.grad_scale_func = self._optimizer.scale_loss
        config.finalize_model_grads_func = finalize_model_grads

    def step(self, batch: RolloutBatch, options: StepOptions) -> StepStats | None:
        """Score the reference, then one optimiser step a mini-batch; collective.

        Returns the statistics on the first tensor- and data-parallel rank of the last stage, None elsewhere.
        Loss: mean over the mini-batch's sequences of the squared residual (algorithm/loss.py).
        """
        if batch.version != self._version:
            raise ValueError(f"policy: rollouts of version {batch.version} for weights of version {self._version}")
        clock = time.perf_counter()
        groups = [list(self._micro_batches(batch, indices, options)) for indices in _mini_batches(batch, options)]
        references = [self._reference.score([pack for _, pack in group], options.temperature) for group in groups]
        record = StepRecord(batch, options, self.backend.device)
        record.seconds["reference"] = time.perf_counter() - clock
        clock = time.perf_counter()
        for group, reference in zip(groups, references, strict=True):
            self._module.zero_grad_buffer()
            self._optimizer.zero_grad()
            self._accumulate(group, reference, batch, options, record)
            self._schedule.step(increment=1)
            _, grad_norm, _ = self._optimizer.step()  # pyright: ignore[reportGeneralTypeIssues]
            record.grad_norms.append(float(grad_norm or 0.0))
        self._version += 1
        record.seconds["policy"] = time.perf_counter() - clock
        return record.stats()

    def _accumulate(
        self,
        group: Sequence[tuple[list[int], PackedBatch]],
        reference: Sequence[Tensor],
        batch: RolloutBatch,
        options: StepOptions,
        record: StepRecord,
    ) -> None:
        advantage = (batch.reward - batch.v_star).float().to(self.backend.device)

        def loss(index: int, sequences: slice, sums: Tensor) -> Tensor:
            indices = group[index][0][sequences]
            losses = astar_loss(sums, reference[index][sequences], advantage[indices], options.beta2)
            record.add(indices, sums, reference[index][sequences], losses)
            return losses / options.mini_batch_size

        run_loss(
            self._module,
            [packed for _, packed in group],
            loss,
            vocab_size=self.model.vocab_size,
            temperature=options.temperature,
            backend=self.backend,
        )

    def _micro_batches(
        self, batch: RolloutBatch, indices: list[int], options: StepOptions
    ) -> Iterator[tuple[list[int], PackedBatch]]:
        """Yield this rank's packs of a mini-batch with the batch indices of their sequences."""
        lengths = [len(batch.token_ids[i]) for i in indices]
        parts = [[indices[i] for i in part] for part in split_evenly(lengths, self.layout.data)]
        mine = parts[parallel_state.get_data_parallel_rank()]
        own_lengths = [len(batch.token_ids[i]) for i in mine]
        for micro in micro_batches(own_lengths, options.micro_batch_tokens):
            chosen = [mine[i] for i in micro]
            packed = pack(
                [batch.token_ids[i] for i in chosen],
                [batch.prompt_tokens[i] for i in chosen],
                share_prefix=self.backend.shares_prefix,
            )
            yield chosen, packed

    def logprobs(
        self, token_ids: Sequence[Sequence[int]], prompt_tokens: Sequence[int], temperature: float = 1.0
    ) -> list[list[float]] | None:
        """Return each response token's log-prob under the policy (nats), on the last stage; collective."""
        packed = pack(token_ids, prompt_tokens, share_prefix=self.backend.shares_prefix)
        found = run_scoring(
            self._module, [packed], vocab_size=self.model.vocab_size, temperature=temperature, backend=self.backend
        )
        if not found:
            return None
        rows: list[list[float]] = [[] for _ in token_ids]
        for sequence, value in zip(packed.sequence.tolist(), found[0].tolist(), strict=True):
            rows[sequence].append(value)
        return rows

    def weights(self) -> dict[str, Tensor]:
        """Return this rank's parameters, current and uncopied."""
        return {name: parameter.data for name, parameter in self._part.named_parameters()}

    def gradients(self) -> dict[str, Tensor]:
        """Return this rank's accumulated float32 gradients, uncopied."""
        return {name: parameter.main_grad for name, parameter in self._part.named_parameters()}  # type: ignore[attr-defined]

    def open_publish(self, engine_tensor: int, num_engines: int, folder: str, bucket_bytes: int) -> None:
        """Prepare to send this rank's tiles to engines of `engine_tensor` workers through files in `folder`."""
        target = self.model.vllm_tiles(engine_tensor)
        route = plan(self.model.megatron_tiles(self.layout), target)
        self._sender = SharedMemorySender(
            route,
            self.rank,
            self.weights(),
            folder,
            self._dtype,
            bucket_bytes=bucket_bytes,
            num_engines=num_engines,
        )
        self._holdings = Holdings(sent_parts(route, self.rank), self.weights(), self._dtype)

    def publish(self, version: int) -> None:
        """Send the current weights; the engines must be receiving, or about to."""
        if self._sender is None:
            raise AssertionError("publish before open_publish")
        self._sender.send(version)

    def digests(self, version: int, full: bool) -> list[int]:
        """Return the digests of what this rank publishes, computed from its parameters: conversion/verify.py."""
        if self._holdings is None:
            raise AssertionError("digests before open_publish")
        return self._holdings.full() if full else self._holdings.sampled(version)

    def digest_rows(self, index: int) -> list[int]:
        """Return the digests of the rows of part `index` of what this rank publishes."""
        if self._holdings is None:
            raise AssertionError("digest_rows before open_publish")
        return self._holdings.rows(index)

    def save(self, folder: str, progress: dict[str, Any]) -> None:
        """Write everything that training needs to go on exactly; collective. See checkpoint.save."""
        checkpoint.save(Path(folder), self._part, self._optimizer, self._schedule, progress, self._path)

    def load(self, folder: str, version: int) -> None:
        """Restore what `save` wrote after `version` batches, in any layout; collective."""
        checkpoint.load(Path(folder), self._part, self._optimizer, self._schedule)
        self._version = version

    def export(self, folder: str, transfer_folder: str, kind: str = "weights") -> None:
        """Write the weights (or with kind="gradients" those) as a Hugging Face folder; collective, rank 0 writes.

        They stream through buckets into the files; conversion.json gets the layout they came from and their digests,
        computed at both ends. Raises WeightMismatch, and leaves no folder, if the files do not hold what the ranks do.
        """
        tensors = self.weights() if kind == "weights" else self.gradients()
        dtype = self._dtype if kind == "weights" else torch.float32
        route = plan(self.model.megatron_tiles(self.layout), self.model.hf_tiles())
        sender = SharedMemorySender(route, self.rank, tensors, transfer_folder, dtype)
        try:
            dist.barrier()  # every sender's file is there
            if self.rank == 0:
                with hf.writing(folder, self._path, dtype) as export:
                    receiver = SharedMemoryReceiver(route, 0, export.tensors, transfer_folder, dtype)
                    with ThreadPoolExecutor(1) as beside:
                        sending = beside.submit(sender.send)
                        receiver.receive()
                        sending.result()
                    receiver.close()
                    digests = check_export(route, tensors, dtype, self._version, export.tensors)
                    export.record.update(layout=dataclasses.asdict(self.layout), digests=digests)
            else:
                sender.send()
                check_export(route, tensors, dtype, self._version, None)
            dist.barrier()
        finally:
            sender.close()

    def close(self) -> None:
        """Leave the group and remove the files of publishing."""
        if self._sender is not None:
            self._sender.close()
        if dist.is_initialized():
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()


def _mini_batches(batch: RolloutBatch, options: StepOptions) -> list[list[int]]:
    size = options.mini_batch_size
    if len(batch) % size:
        raise ValueError(f"a batch of {len(batch)} sequences is no multiple of the mini-batch, {size}")
    return [list(range(start, start + size)) for start in range(0, len(batch), size)]


def _constant_schedule(optimizer: Any, optim: OptimConfig) -> OptimizerParamScheduler:
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optim.lr,
        min_lr=optim.lr,
        lr_warmup_steps=optim.warmup_steps,
        lr_decay_steps=optim.warmup_steps + 1,
        lr_decay_style="constant",
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=1,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,  # a resumed run takes the learning rate of its configuration
    )
