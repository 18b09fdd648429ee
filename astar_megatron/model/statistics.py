"""Collects what a step did, sequence by sequence, and sums it up over data-parallel ranks.

Shapes: B sequences of the step, b of them.
"""

import math
import statistics
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from astar_megatron.model.backend import Backend
from astar_megatron.types import RolloutBatch, Span, StepStats, seconds_of

_LOGPROB, _REFERENCE, _LOSS = range(3)


class StepRecord:
    """Rows of one step, filled on the last stage while its losses are computed."""

    def __init__(self, batch: RolloutBatch, backend: Backend) -> None:
        self._batch, self._backend = batch, backend
        self._rows = torch.zeros(len(batch), 3, dtype=torch.float64)
        self._tokens = torch.zeros(2, batch.response_tokens(), dtype=torch.float32, device=backend.device)
        self._start = time.perf_counter()
        self.grad_norms: list[float] = []
        self.skipped: list[int] = []  # mini-batches whose step was not taken
        self.learning_rate = 0.0
        self.changed_weights = 0.0
        self.flops = 0  # model FLOPs of this rank's packs
        self._spans: list[Span] = []
        self.critic: list[tuple[bool, float, Tensor]] = []  # of each mini-batch: step taken, norm, sum of losses here

    def add(self, indices: Sequence[int], logprobs: Tensor, reference: Tensor, losses: Tensor) -> None:
        """Note the sums of log-probs (nats) and the losses of the sequences `indices`."""
        # A copy: the schedule divides the loss tensor in place.
        rows = torch.stack((logprobs, reference, losses), dim=1).detach().to("cpu", torch.float64, copy=True)
        self._rows[list(indices)] = rows

    def add_tokens(self, places: Tensor, logprobs: Tensor, reference: Tensor) -> None:
        """Note the log-probs (nats) of response tokens held here, which lie at `places` of the batch's, each [r]."""
        self._tokens[:, places] = torch.stack((logprobs.detach(), reference)).to(self._tokens)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Note when the body ran, with the work that it gave to the device."""
        start = time.perf_counter() - self._start
        yield
        self._backend.wait()
        self._spans.append(Span(name=name, who="ranks", start=start, end=time.perf_counter() - self._start))

    def is_finite(self, indices: Sequence[int]) -> bool:
        """Say whether what this rank noted of the sequences `indices` is: no NaN, no Inf."""
        return bool(self._rows[list(indices)].isfinite().all())

    def largest_logratio(self) -> float:
        """Return the largest |D| of what this rank noted (nats)."""
        return float((self._rows[:, _LOGPROB] - self._rows[:, _REFERENCE]).abs().max())

    def stats(self) -> StepStats | None:
        """Return the step's statistics on the reporting rank, None elsewhere; collective over all ranks."""
        memory = self._memory_of_all_ranks()
        if not parallel_state.is_pipeline_last_stage():
            return None
        flops = torch.tensor(float(self.flops), dtype=torch.float64)
        value_loss = torch.tensor(sum(float(total) for *_, total in self.critic), dtype=torch.float64)
        if parallel_state.get_data_parallel_world_size() > 1:
            sums = torch.cat((self._rows.flatten(), flops.view(1), value_loss.view(1))).to(self._backend.device)
            dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())  # type: ignore[arg-type]
            self._rows, flops, value_loss = sums[:-2].cpu().view_as(self._rows), sums[-2].cpu(), sums[-1].cpu()
        if parallel_state.get_data_parallel_world_size(with_context_parallel=True) > 1:
            group = parallel_state.get_data_parallel_group(with_context_parallel=True)
            dist.all_reduce(self._tokens, group=group)  # each token is noted by one rank, 0 elsewhere
        ranks = (
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_data_parallel_rank(with_context_parallel=True),
        )
        return None if any(ranks) else self._summed_up(float(flops), float(value_loss), memory)

    def _summed_up(self, flops: float, value_loss: float, memory: tuple[int, ...]) -> StepStats:
        batch, rows = self._batch, self._rows
        logprob, reference = rows[:, _LOGPROB], rows[:, _REFERENCE]
        token_logprobs, reference_token_logprobs = self._tokens.cpu()
        seconds = sum(seconds_of(self._spans).values())
        peak = self._backend.peak_flops
        tokens = sum(len(ids) for ids in batch.token_ids)
        taken = [norm for index, norm in enumerate(self.grad_norms) if index not in self.skipped]
        return StepStats(
            loss=float(rows[:, _LOSS].mean()),
            grad_norm=statistics.fmean(taken) if taken else math.nan,
            grad_norms=tuple(self.grad_norms),
            learning_rate=self.learning_rate,
            changed_weights=self.changed_weights,
            skipped=tuple(self.skipped),
            tokens=tokens,
            response_tokens=batch.response_tokens(),
            tokens_per_second=tokens / seconds,
            model_flops=flops,
            mfu=flops / (seconds * peak * len(memory)) if peak else None,
            peak_memory_bytes=memory,
            spans=tuple(self._spans),
            logprobs=tuple(logprob.tolist()),
            reference_logprobs=tuple(reference.tolist()),
            token_logprobs=array("f", token_logprobs.numpy().tobytes()),
            reference_token_logprobs=array("f", reference_token_logprobs.numpy().tobytes()),
            losses=tuple(rows[:, _LOSS].tolist()),
            critic=self._of_critic(value_loss),
        )

    def _of_critic(self, value_loss: float) -> dict[str, float]:
        if not self.critic:
            return {}
        norms = [norm for taken, norm, _ in self.critic if taken]
        return {
            "critic_loss": value_loss / len(self._batch),
            "critic_grad_norm": statistics.fmean(norms) if norms else math.nan,
            "critic_skipped_steps": float(sum(not taken for taken, *_ in self.critic)),
        }

    def _memory_of_all_ranks(self) -> tuple[int, ...]:
        mine = torch.tensor([self._backend.peak_memory_bytes()], dtype=torch.int64, device=self._backend.device)
        peaks = torch.empty(dist.get_world_size(), dtype=torch.int64, device=self._backend.device)
        dist.all_gather_into_tensor(peaks, mine)
        return tuple(peaks.tolist())
