"""A step of the policy on one rank: score what the loss reads, then one optimiser step a mini-batch.

Shapes: B sequences of a step, b of a pack; r response tokens of a pack that this rank holds.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from astar_megatron.algorithm.objective import CriticLoss, Loss, ResponseTokens
from astar_megatron.model.backend import Backend
from astar_megatron.model.build import overlaps
from astar_megatron.model.critic import Critic
from astar_megatron.model.flops import forward_flops
from astar_megatron.model.forward import HeldTokens, OwnScores, run_loss, run_own_scoring
from astar_megatron.model.learning import Learning
from astar_megatron.model.micro_batches import Group, GroupColumns, micro_batches, mini_batches
from astar_megatron.model.optimizer import learning_rate
from astar_megatron.model.reference import Reference
from astar_megatron.model.statistics import StepRecord
from astar_megatron.types import RolloutBatch, StepOptions, StepStats
from conversion.families import Model
from conversion.tiles import ParallelLayout


class Learner:
    """This rank's part of the policy, as it learns beside the reference, and of a critic."""

    def __init__(
        self,
        model: Model,
        layout: ParallelLayout,
        backend: Backend,
        policy: Learning,
        reference: Reference,
        critic: Critic | None = None,
    ) -> None:
        self._model, self._layout, self._backend = model, layout, backend
        self._policy, self._reference, self._critic = policy, reference, critic

    def step(
        self, batch: RolloutBatch, loss: Loss, options: StepOptions, weights: Mapping[str, Tensor], *, is_first: bool
    ) -> StepStats | None:
        """Take a step; collective. Returns and leaves out as PolicyRank.step does.

        `weights` are the rank's parameters, which at the first step of a run may be the reference's.
        """
        record = StepRecord(batch, self._backend)
        with record.span("reference"), self._backend.range("reference"):
            groups = [
                list(micro_batches(batch, indices, options, self._layout, self._backend))
                for indices in mini_batches(batch, options)
            ]
            record.changed_weights = self._reference.share_changed(weights)
            at_start = is_first and record.changed_weights == 0.0
            references = [
                self._score_reference(group, options, record, checks_only=at_start and not index)
                for index, group in enumerate(groups)
            ]
        batch = self._with_values(groups, batch, loss, options, record)
        with record.span("policy"):
            reads_old = bool(loss.needs & {"old", "peer_shift"})
            # The first mini-batch learns before any step: what its gradient sees is the old.
            olds = [None, *(self._score(group, options, record) if reads_old else None for group in groups[1:])]
            for index, (group, reference, old) in enumerate(zip(groups, references, olds, strict=True)):
                columns = GroupColumns(batch, group, self._backend.device)
                if "peer_shift" in loss.needs:
                    shift = self._shift(group, old, options, record, len(batch))
                    columns.add("peer_shift", shift[columns["peer"].long()])
                with self._backend.range("policy"):
                    self._accumulate(group, reference, old, columns, loss, options, record)
                if at_start and not index:
                    _check_start(record.largest_logratio())
                is_finite = record.is_finite([i for indices, _ in group for i in indices])
                with self._backend.range("optimizer"):
                    taken, norm = self._policy.step(is_finite=is_finite, device=self._backend.device)
                record.grad_norms.append(norm)
                record.skipped += [] if taken else [index]
            for module in self._policy.modules if overlaps() else ():
                module.start_param_sync(force_sync=True)  # or weights would be gathered in the next forward pass only
            record.learning_rate = learning_rate(self._policy.optimizer)
        self._teach_critic(groups, batch, loss, options, record)
        return record.stats()

    def _with_values(
        self, groups: Sequence[Group], batch: RolloutBatch, loss: Loss, options: StepOptions, record: StepRecord
    ) -> RolloutBatch:
        """Return the batch with the columns that a loss makes of the critic's values, if it needs them."""
        if "values" not in loss.needs:
            return batch
        assert self._critic is not None, "this loss needs a critic: PolicyRank's critic_lr"
        with record.span("critic"), self._backend.range("critic"):
            values = self._critic.values(groups, batch, options)
            lengths = batch.response_lengths().tolist()
            rewards = batch.columns["reward"].to(values)
            made = cast(CriticLoss, loss).with_values(rewards, values, lengths)
        return dataclasses.replace(batch, token_columns={**batch.token_columns, **made})

    def _teach_critic(
        self, groups: Sequence[Group], batch: RolloutBatch, loss: Loss, options: StepOptions, record: StepRecord
    ) -> None:
        if self._critic is None or "values" not in loss.needs:
            return
        with record.span("critic"), self._backend.range("critic"):
            for group in groups:
                record.critic.append(self._critic.step(group, batch, cast(CriticLoss, loss).value, options))
                record.flops += self._critic.flops(group)

    def _score_reference(
        self, group: Group, options: StepOptions, record: StepRecord, *, checks_only: bool
    ) -> list[Tensor | None]:
        """Return the reference's log-probs [r] of each pack, None where the policy's own are to be taken.

        With the reference's weights policy and reference are the same function: `checks_only` scores the lightest packs
        alone, as many as a pipeline needs, to see that they are.
        """
        packs = [packed for _, packed in group]
        skipped = max(0, len(packs) - self._layout.pipeline) if checks_only else 0
        record.flops += sum(forward_flops(self._model, packed) for packed in packs[skipped:])
        return [None] * skipped + self._reference.score(packs[skipped:], options.temperature)

    def _score(self, group: Group, options: StepOptions, record: StepRecord) -> list[OwnScores]:
        """Return what the policy gives now; nothing on stages before the last."""
        packs = [packed for _, packed in group]
        record.flops += sum(forward_flops(self._model, packed) for packed in packs)
        with self._backend.range("own scores"):
            return run_own_scoring(
                self._policy.modules,
                packs,
                vocab_size=self._model.vocab_size,
                temperature=options.temperature,
                backend=self._backend,
            )

    def _shift(
        self, group: Group, old: list[OwnScores] | None, options: StepOptions, record: StepRecord, count: int
    ) -> Tensor:
        """Return [B], by how much the log-prob of each response of the mini-batch has moved since `old` was scored.

        Of other mini-batches' responses it says 0, and of all without `old`. Collective.
        """
        shift = torch.zeros(count, dtype=torch.float64, device=self._backend.device)
        if old is None:
            return shift
        for (indices, _), now, before in zip(group, self._score(group, options, record), old, strict=False):
            shift[indices] = (now.sums - before.sums).to(shift)
        dist.all_reduce(shift, group=parallel_state.get_data_parallel_group())  # type: ignore[arg-type]
        return shift

    def _accumulate(
        self,
        group: Group,
        reference: Sequence[Tensor | None],
        old: list[OwnScores] | None,
        columns: GroupColumns,
        loss: Loss,
        options: StepOptions,
        record: StepRecord,
    ) -> None:
        """Form the gradient of a mini-batch's mean loss and note its sequences in `record`."""
        scale = loss.gradient_scale / options.mini_batch_size

        def scaled_loss(index: int, held_tokens: HeldTokens, logprobs: Tensor) -> Tensor:
            indices, of_losses = columns.seen_by_loss(index, held_tokens)
            known, before = reference[index], None
            if "old" in loss.needs:
                before = logprobs.detach() if old is None else old[index].logprobs[held_tokens.own]
            tokens = ResponseTokens(
                logprobs=logprobs,
                reference_logprobs=logprobs.detach() if known is None else known[held_tokens.own],
                lengths=held_tokens.lengths,
                sum_tokens=held_tokens.total,
                before=before,
            )
            losses = loss(tokens, of_losses)
            record.add(indices, tokens.sums, tokens.reference_sums, losses)
            record.add_tokens(columns.places(index, held_tokens), logprobs, tokens.reference_logprobs)
            return losses * scale

        self._policy.zero_grad()
        packs = [packed for _, packed in group]
        record.flops += 3 * sum(forward_flops(self._model, packed) for packed in packs)
        run_loss(
            self._policy.modules,
            packs,
            scaled_loss,
            vocab_size=self._model.vocab_size,
            temperature=options.temperature,
            backend=self._backend,
        )


def _check_start(largest_logratio: float) -> None:
    """Raise AssertionError where the weights are the reference's and the log-probs are not; NaN is not judged here."""
    if largest_logratio > 0.0:
        raise AssertionError(
            f"policy and reference have the same weights, but their log-probs of a response differ by "
            f"{largest_logratio:.3g} nats: they don't run the same kernels in the same precision and shapes, or sums "
            "over ranks have no fixed order"
        )
