"""The critic of a method that has one: a Megatron model of its own with a value of each response token.

It is built as the policy is and begins with the policy's weights; its head, one weight a hidden unit, begins at 0, so
that every value does. Ranks hold it in the policy's layout, with an optimizer of its own.

Shapes: N response tokens of a batch in order, r of a pack that this rank holds.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from astar_megatron.algorithm.objective import Loss, ResponseTokens
from astar_megatron.config import OptimConfig
from astar_megatron.model.backend import Backend
from astar_megatron.model.build import build_copy, named_parameters
from astar_megatron.model.flops import forward_flops
from astar_megatron.model.forward import HeldTokens, run_loss, run_scoring
from astar_megatron.model.head.value import ValueHead
from astar_megatron.model.learning import Dither, make_learning
from astar_megatron.model.micro_batches import Group, GroupColumns
from astar_megatron.types import RolloutBatch, StepOptions
from conversion.families import Model
from conversion.tiles import ParallelLayout

_HEAD = "value_head"


class Critic:
    """This rank's part of the critic. `config` is megatron's description of it, which no other model shares."""

    def __init__(
        self,
        model: Model,
        layout: ParallelLayout,
        config: TransformerConfig,
        weights: Mapping[str, Tensor],
        backend: Backend,
        optim: OptimConfig,
        num_steps: int,
        dither: Dither | None,
    ) -> None:
        self._model, self._layout, self._backend = model, layout, backend
        chunks = build_copy(model, layout, config, backend, weights)
        head = torch.zeros(model.dims.hidden_size, dtype=config.params_dtype, device=backend.device)
        self._head = torch.nn.Parameter(head)
        # Sequence-parallel ranks all compute the whole head: its gradient is not summed over them.
        if parallel_state.is_pipeline_last_stage():
            chunks[-1].register_parameter(_HEAD, self._head)
            if not chunks[-1].share_embeddings_and_output_weights:
                named_parameters(chunks[-1:])["output_layer.weight"].requires_grad_(False)  # no part in a value
        # With overlap a weight without gradient would be waited for.
        self.learning = make_learning(chunks, config, optim, num_steps, dither, overlap=False)

    def values(self, groups: Sequence[Group], batch: RolloutBatch, options: StepOptions) -> Tensor:
        """Return the values [N] of the whole batch, on all ranks; collective over all."""
        lengths = batch.response_lengths().tolist()
        rows = list(torch.arange(sum(lengths)).split(lengths))
        values = torch.zeros(sum(lengths), dtype=torch.float64, device=self._backend.device)
        for group in groups:
            packs = [packed for _, packed in group]
            for (indices, _), scores in zip(group, run_scoring(packs=packs, **self._run(options)), strict=False):
                values[torch.cat([rows[i] for i in indices])] = scores.to(values)
        # Only the last stage has any; of its ranks those that share tensors or tokens have the same.
        dist.all_reduce(values)
        return values / (self._layout.tensor * self._layout.context)

    def step(self, group: Group, batch: RolloutBatch, loss: Loss, options: StepOptions) -> tuple[bool, float, Tensor]:
        """Take an optimiser step by the mean loss of a mini-batch; collective over all ranks.

        Returns whether it was taken, the gradient's norm, and the sum of this rank's losses.
        """
        columns = GroupColumns(batch, group, self._backend.device)
        total = torch.zeros((), dtype=torch.float64, device=self._backend.device)

        def scaled_loss(index: int, held_tokens: HeldTokens, values: Tensor) -> Tensor:
            _, of_losses = columns.seen_by_loss(index, held_tokens)
            tokens = ResponseTokens(
                logprobs=values,
                reference_logprobs=values.detach(),
                lengths=held_tokens.lengths,
                sum_tokens=held_tokens.total,
            )
            losses = loss(tokens, of_losses)
            total.add_(losses.detach().double().sum())
            return losses * (loss.gradient_scale / options.mini_batch_size)

        self.learning.zero_grad()
        run_loss(packs=[packed for _, packed in group], loss=scaled_loss, **self._run(options))
        taken, norm = self.learning.step(is_finite=bool(total.isfinite()), device=self._backend.device)
        return taken, norm, total

    def flops(self, group: Group) -> int:
        """Return those of scoring a mini-batch and learning from it, as of a policy."""
        return 4 * sum(forward_flops(self._model, packed) for _, packed in group)

    def _run(self, options: StepOptions) -> dict[str, Any]:
        return {
            "modules": self.learning.modules,
            "vocab_size": self._model.vocab_size,
            "temperature": options.temperature,
            "backend": self._backend,
            "head": ValueHead(self._head),
        }
