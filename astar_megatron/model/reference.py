"""The reference: the policy's own model class, kernels and precision, with the weights it started from or had later."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from astar_megatron.algorithm.packing import PackedBatch
from astar_megatron.model.backend import Backend
from astar_megatron.model.build import build_copy, in_compute_type, named_parameters
from astar_megatron.model.forward import run_own_scoring
from astar_megatron.model.parking import forget_fp8_copies
from conversion.families import Model
from conversion.plan import plan
from conversion.tiles import ParallelLayout
from conversion.transfer.pieces import view


class Reference:
    """A second copy of this rank's part of the model; its weights change by `copy` alone.

    `is_copy` says that they are no longer those that training starts from: a checkpoint must hold them. With `offload`
    they lie in host memory and are on the device only while they score.
    """

    def __init__(
        self,
        model: Model,
        layout: ParallelLayout,
        rank: int,
        config: TransformerConfig,
        weights: Mapping[str, Tensor],
        backend: Backend,
        *,
        offload: bool = False,
    ) -> None:
        self._model, self._backend = model, backend
        chunks = build_copy(model, layout, config, backend, weights)
        # requires_grad stays on, although nothing asks for a gradient: megatron and torch.matmul take other kernels for
        # a frozen weight, and the log-ratio at step 0 would be 1e-5 instead of exactly 0.
        self.chunks, self.is_copy = chunks, False
        self._modules: list[Any] = [in_compute_type(part, config) for part in chunks]
        self._parameters = named_parameters(chunks)
        # Each element of the model once, whatever layout holds copies of it.
        whole = plan(model.megatron_tiles(layout, layout.senders()), model.hf_tiles())
        self._pieces = {copy.source for copy in whole.from_rank(rank)}
        self._host: dict[str, Tensor] = {}
        if offload:
            for name, parameter in self._parameters.items():
                self._host[name] = torch.empty_like(parameter, device="cpu", pin_memory=True).copy_(parameter.detach())
            self._release()

    def score(self, packs: Sequence[PackedBatch], temperature: float) -> list[Tensor]:
        """Return for each pack the [r] log-probs (nats) of the response tokens held here, on the last stage only."""
        with self.on_device():
            scores = run_own_scoring(
                self._modules,
                packs,
                vocab_size=self._model.vocab_size,
                temperature=temperature,
                backend=self._backend,
            )
        forget_fp8_copies(self.chunks)
        return [pack_scores.logprobs for pack_scores in scores]

    def copy(self, weights: Mapping[str, Tensor]) -> None:
        """Take over `weights`, this rank's parameters of the policy."""
        with self.changing(), torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(weights[name])

    @contextmanager
    def changing(self) -> Iterator[None]:
        """The body may write the parameters of `chunks`."""
        with self.on_device():
            yield
            for name, host in self._host.items():
                host.copy_(self._parameters[name].detach())
        self.is_copy = True

    def share_changed(self, weights: Mapping[str, Tensor]) -> float:
        """Return the share of all ranks' `weights` that are not bitwise the reference's; collective over all ranks."""
        with self.on_device():
            changed = torch.zeros((), dtype=torch.float64, device=self._backend.device)
            for piece in self._pieces:
                mine = view(self._parameters, piece)
                # in the reference's type, which the forward pass computes in
                changed += (mine != view(weights, piece).to(mine.dtype)).sum()
        dist.all_reduce(changed)
        return float(changed) / self._model.num_parameters()

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """The body may read the parameters."""
        for name, host in self._host.items():
            self._parameters[name].data = host.to(self._backend.device, non_blocking=True)
        try:
            yield
        finally:
            self._release()

    def _release(self) -> None:
        for name in self._host:
            self._parameters[name].data = self._parameters[name].data.new_empty(0)
