"""Collects what a step did, sequence by sequence, and sums it up over data-parallel ranks.

Shapes: B sequences of the step.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from astar_megatron.algorithm.metrics import regression
from astar_megatron.types import RolloutBatch, StepOptions, StepStats

_LOGPROB, _REFERENCE, _LOSS = range(3)


class StepRecord:
    """Rows of one step, filled on the last stage while its losses are computed."""

    def __init__(self, batch: RolloutBatch, options: StepOptions, device: torch.device) -> None:
        self._batch, self._options, self._device = batch, options, device
        self._rows = torch.zeros(len(batch), 3, dtype=torch.float64)
        self.grad_norms: list[float] = []
        self.seconds: dict[str, float] = {}

    def add(self, indices: Sequence[int], logprobs: Tensor, reference: Tensor, losses: Tensor) -> None:
        """Note the sums of log-probs (nats) and the losses of the sequences `indices`."""
        # A copy: the schedule divides the loss tensor in place.
        rows = torch.stack((logprobs, reference, losses), dim=1).detach().to("cpu", torch.float64, copy=True)
        self._rows[list(indices)] = rows

    def stats(self) -> StepStats | None:
        """Return the step's statistics on the reporting rank, None elsewhere; collective over the last stage."""
        if not parallel_state.is_pipeline_last_stage():
            return None
        group = parallel_state.get_data_parallel_group()
        if parallel_state.get_data_parallel_world_size() > 1:
            rows = self._rows.to(self._device)
            dist.all_reduce(rows, group=group)  # type: ignore[arg-type]
            self._rows = rows.cpu()
        replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        if parallel_state.get_tensor_model_parallel_rank() or replica:
            return None
        batch, rows = self._batch, self._rows
        logratio = rows[:, _LOGPROB] - rows[:, _REFERENCE]
        line = regression(batch.reward - batch.v_star, self._options.beta2 * logratio)
        return StepStats(
            loss=float(rows[:, _LOSS].mean()),
            grad_norm=sum(self.grad_norms) / len(self.grad_norms),
            logratio_mean=float(logratio.mean()),
            logratio_std=float(logratio.std(correction=0)),
            logratio_max=float(logratio.abs().max()),
            slope=line.slope,
            r_squared=line.r_squared,
            engine_gap=float((rows[:, _LOGPROB] - batch.rollout_logprob)[: self._options.mini_batch_size].mean()),
            tokens=sum(len(ids) for ids in batch.token_ids),
            response_tokens=batch.response_tokens(),
            seconds=dict(self.seconds),
        )
