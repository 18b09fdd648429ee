"""The frozen reference: the policy's own model class, kernels and precision, with the weights it started from."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from astar_megatron.algorithm.packing import PackedBatch
from astar_megatron.model.backend import Backend
from astar_megatron.model.build import build, in_compute_type, named_parameters
from astar_megatron.model.forward import run_sums
from conversion.families import Model
from conversion.tiles import ParallelLayout


class Reference:
    """A second copy of this rank's part of the model; its weights never change after construction."""

    def __init__(
        self,
        model: Model,
        layout: ParallelLayout,
        config: TransformerConfig,
        weights: Mapping[str, Tensor],
        backend: Backend,
    ) -> None:
        self._model, self._backend = model, backend
        chunks = build(model, layout, config, backend)
        with torch.no_grad():
            for name, parameter in named_parameters(chunks).items():
                parameter.copy_(weights[name])
        # requires_grad stays on, although nothing asks for a gradient: megatron and torch.matmul take other kernels for
        # a frozen weight, and the log-ratio at step 0 would be 1e-5 instead of exactly 0.
        self._modules: list[Any] = [in_compute_type(part, config) for part in chunks]

    def score(self, packs: Sequence[PackedBatch], temperature: float) -> list[Tensor]:
        """Return for each pack the [B] sums of its responses' log-probs (nats) on the last stage, else nothing."""
        return run_sums(
            self._modules,
            packs,
            vocab_size=self._model.vocab_size,
            temperature=temperature,
            backend=self._backend,
        )
