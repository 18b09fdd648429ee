"""The optimiser step: schedules, decay, scales, the reference, and that what is not finite changes nothing."""

import dataclasses
import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import training as work
from samples import logratio_max
from test_layouts import batch
from training import Run, Trained

from astar_megatron.config import ParallelConfig
from astar_megatron.types import RolloutBatch, StepStats


def train(ranks: Any, run: Run, **more: Any) -> list[Trained]:
    return ranks.run(work.trained, ParallelConfig(**run.axes).world_size, run=run, **more)


def stats_of(answers: list[Trained]) -> list[StepStats]:
    return next(answer.stats for answer in answers if answer.stats[0] is not None)


def spoiled(data: RolloutBatch, index: int, value: float = float("nan")) -> RolloutBatch:
    v_star = data.columns["v_star"].clone()
    v_star[index] = value
    return with_columns(data, v_star=v_star)


def with_columns(data: RolloutBatch, **columns: torch.Tensor) -> RolloutBatch:
    return dataclasses.replace(data, columns={**data.columns, **columns})


SPOILED = [
    ({}, float("nan")),
    ({"data": 2}, float("nan")),
    ({"data": 2}, float("inf")),
    ({"data": 2}, 1.5e19),
    ({"pipeline": 2, "data": 2}, float("nan")),
    ({"pipeline": 2, "virtual": 3}, float("nan")),
    ({"tensor": 2, "context": 2}, 1.5e19),
]


@pytest.mark.parametrize(("axes", "value"), SPOILED, ids=str)
def test_a_step_that_is_not_finite_changes_nothing_on_any_rank(
    axes: dict[str, int], value: float, ranks: Any, untied_qwen2: Path
) -> None:
    """One sequence, so one data-parallel rank, is bad; of the last one the loss is finite, the gradient's norm not."""
    good, later = batch(1), batch(2, version=2)
    bad = dataclasses.replace(spoiled(batch(3), 5, value), version=1)
    run = Run(str(untied_qwen2), [good, bad, later], axes=axes, scale="pg")
    answers = train(ranks, run)
    for rank in answers:
        before, after_good, after_bad, after_later = rank.digests
        assert before != after_good == after_bad != after_later
    stats = stats_of(answers)
    assert [step.skipped for step in stats] == [(), (0,), ()]
    assert math.isfinite(stats[1].loss) == (value == 1.5e19)
    assert not math.isfinite(stats[1].grad_norms[0]) and math.isnan(stats[1].grad_norm)
    assert math.isfinite(stats[2].loss + stats[2].grad_norm)


def test_a_bad_mini_batch_leaves_the_good_one_beside_it(ranks: Any, tied_llama: Path) -> None:
    data, later = batch(1), batch(2, version=1)
    first = dataclasses.replace(
        data,
        token_ids=data.token_ids[:4],
        prompt_tokens=data.prompt_tokens[:4],
        columns={name: column[:4] for name, column in data.columns.items()},
    )
    run = Run(str(tied_llama), [spoiled(data, 6), later], mini_batch_size=4)
    (trained,), (wanted,) = train(ranks, run), train(ranks, dataclasses.replace(run, batches=[first, later]))
    assert [step.skipped for step in trained.stats] == [(1,), ()]
    assert trained.digests == wanted.digests
    assert trained.stats[1].loss == wanted.stats[1].loss
    assert trained.stats[0].grad_norm == trained.stats[0].grad_norms[0] == wanted.stats[0].grad_norm


@pytest.mark.parametrize(("spoiled_step", "saved_after"), [(1, 2), (0, 1)], ids=["one", "every step until then"])
def test_a_run_resumed_after_a_skipped_step_is_the_uninterrupted_run(
    spoiled_step: int, saved_after: int, ranks: Any, tied_llama: Path, tmp_path: Path
) -> None:
    batches = [batch(version, version=version) for version in range(4)]
    batches[spoiled_step] = spoiled(batches[spoiled_step], 2)
    whole = Run(str(tied_llama), batches, optim={"schedule": "cosine", "warmup_steps": 1})
    (wanted,) = train(ranks, whole)
    save = str(tmp_path / f"step_{saved_after:08d}")
    train(ranks, dataclasses.replace(whole, batches=batches[:saved_after], save=save))
    (trained,) = train(ranks, dataclasses.replace(whole, batches=batches[saved_after:], load=save))
    first, later = wanted.digests[saved_after:], wanted.stats[saved_after:]
    assert trained.digests[1:] == first[1:] and (saved_after == 1 or trained.digests[0] == first[0])
    assert [step.loss for step in trained.stats] == [step.loss for step in later]
    assert [step.learning_rate for step in trained.stats] == [step.learning_rate for step in later]


def test_weights_that_are_spoiled_skip_every_step(ranks: Any, tied_llama: Path) -> None:
    run = Run(str(tied_llama), [batch(1), batch(2, version=1)], mini_batch_size=4)
    (trained,) = train(ranks, run, tamper=work.spoil_a_weight)
    assert [step.skipped for step in trained.stats] == [(0, 1), (0, 1)]
    assert len(set(trained.digests)) == 1


@pytest.mark.parametrize("kind", ["tied_llama", "untied_qwen2"])
def test_all_but_biases_and_norms_decay(kind: str, ranks: Any, request: pytest.FixtureRequest) -> None:
    """With r = V* at step 0 the gradient is exactly 0, and the decay is all that moves a weight."""
    data = batch(1)
    data = with_columns(data, v_star=data.columns["reward"].clone())
    optim = {"lr": 0.125, "weight_decay": 0.5}
    (trained,) = train(ranks, Run(str(request.getfixturevalue(kind)), [data], optim=optim))
    assert trained.stats[0].grad_norm == 0.0
    kept = {name for name in trained.ratios if name.endswith("bias") or "norm" in name}
    assert len(kept) >= 13
    for name, ratio in trained.ratios.items():
        assert ratio == pytest.approx((1.0, 1.0) if name in kept else (1 - 0.0625,) * 2, rel=1e-6), name
    assert not trained.changed & kept


def test_the_learning_rate_follows_its_schedule(ranks: Any, tied_llama: Path) -> None:
    """Steps 1 to 6; a skipped one does not count, so the rate goes on from where it was."""
    batches = [batch(version, version=version) for version in range(3)]
    batches[1] = spoiled(batches[1], 1)
    rates = {}
    for name, optim in {
        "constant": {"warmup_steps": 3},
        "cosine": {"schedule": "cosine", "warmup_steps": 1, "min_lr": 1e-4},
        "wsd": {"schedule": "wsd", "decay_steps": 2, "min_lr": 1e-4},
    }.items():
        run = Run(str(tied_llama), batches, optim=optim, mini_batch_size=4, optimizer_steps=4)
        rates[name] = [step.learning_rate for step in stats_of(train(ranks, run))]
    assert rates["constant"] == pytest.approx([1e-3 * 2 / 3, 1e-3, 1e-3])  # after 2, 3 and 5 steps taken
    cosine = {n: 1e-4 + 9e-4 * 0.5 * (1 + math.cos(math.pi * (n - 1) / 4)) for n in (2, 3, 5)}
    assert rates["cosine"] == pytest.approx(list(cosine.values()))
    assert rates["wsd"] == pytest.approx([1e-3, 1e-4 + 9e-4 * 2 / 3, 1e-4])


def test_the_policy_gradients_scale_divides_the_gradient_by_2_beta2(ranks: Any, tied_llama: Path) -> None:
    first_steps = {}
    scales: tuple[Literal["paper", "pg"], ...] = ("paper", "pg")
    for scale in scales:
        (trained,) = train(ranks, Run(str(tied_llama), [batch(1)], scale=scale))
        first_steps[scale] = trained.stats[0]
    assert first_steps["pg"].grad_norm == pytest.approx(first_steps["paper"].grad_norm / (2 * 0.05), rel=1e-5)
    assert first_steps["pg"].loss == first_steps["paper"].loss


def test_the_gradient_is_clipped_to_its_norm(ranks: Any, tied_llama: Path) -> None:
    """With an eps far above the gradient Adam's first step is lr / eps times the gradient."""
    optim = {"lr": 1e4, "adam_eps": 1e4, "weight_decay": 0.0}
    moved = {}
    for clip in (0.0, 0.01):
        (trained,) = train(ranks, Run(str(tied_llama), [batch(1)], optim=optim | {"clip_grad": clip}))
        moved[clip] = trained.moved
        norm = trained.stats[0].grad_norm
    assert norm > 0.1  # before clipping
    assert moved[0.0] == pytest.approx(norm, rel=1e-3)
    assert moved[0.01] == pytest.approx(0.01, rel=1e-3)


def test_importance_weights_scale_the_gradient_and_are_one_on_policy(ranks: Any, tied_llama: Path) -> None:
    plain = Run(str(tied_llama), [batch(1)])
    (base,) = train(ranks, plain)
    logprob = torch.tensor(base.stats[0].logprobs, dtype=torch.float64)
    norms = {}
    for ratio, cap in ((1.0, 1.0), (0.5, 2.0), (8.0, 3.0)):
        data = with_columns(batch(1), rollout_logprob=logprob - math.log(ratio))
        run = dataclasses.replace(plain, batches=[data], importance_cap=cap)
        norms[ratio] = stats_of(train(ranks, run))[0].grad_norm / base.stats[0].grad_norm
    assert norms == pytest.approx({1.0: 1.0, 0.5: 0.5, 8.0: 3.0}, rel=1e-4)


@pytest.mark.parametrize("axes", [{}, {"tensor": 2, "pipeline": 2}, {"pipeline": 2, "virtual": 3}], ids=str)
def test_an_offloaded_reference_is_the_resident_one(axes: dict[str, int], ranks: Any, tied_llama: Path) -> None:
    run = Run(str(tied_llama), [batch(1), batch(2, version=1)], axes=axes)
    resident, offloaded = (train(ranks, dataclasses.replace(run, reference=kind)) for kind in ("resident", "offload"))
    assert [answer.digests for answer in offloaded] == [answer.digests for answer in resident]
    assert stats_of(offloaded)[1].reference_logprobs == stats_of(resident)[1].reference_logprobs
    assert logratio_max(stats_of(offloaded)[1]) > 0.0


def test_the_first_mini_batch_needs_one_pack_of_the_reference_and_no_other_does(ranks: Any, tied_llama: Path) -> None:
    """Counted in model FLOPs: forward and backward of every pack, and a forward pass for each that is scored."""
    data = batch(1)
    run = Run(str(tied_llama), [data, dataclasses.replace(data, version=1)], micro_batch_tokens=40)
    (whole,) = train(ranks, run)
    (halves,) = train(ranks, dataclasses.replace(run, mini_batch_size=4))
    first, later = (stats.model_flops for stats in whole.stats)
    assert 3 / 4 * later < first < 0.9 * later
    assert logratio_max(whole.stats[0]) == 0.0 < logratio_max(whole.stats[1])
    assert first < halves.stats[0].model_flops < halves.stats[1].model_flops == pytest.approx(later, rel=0.1)
    assert logratio_max(halves.stats[0]) > 0.0  # of the second mini-batch, which the first one's step came before


def test_a_reference_that_computes_another_function_is_found_at_step_0(ranks: Any, tied_llama: Path) -> None:
    with pytest.raises(AssertionError, match="policy and reference have the same weights, but"):
        train(ranks, Run(str(tied_llama), [batch(1)]), tamper=work.turn_the_reference)


def test_many_experts_a_token_weigh_the_same_for_policy_and_reference(
    ranks: Any, tiny_family: Callable[..., Path]
) -> None:
    folder = tiny_family("qwen3_moe", num_experts=128, num_experts_per_tok=8)
    (trained,) = train(ranks, Run(str(folder), [batch(1, count=32)], mini_batch_size=32))
    assert logratio_max(trained.stats[0]) == 0.0


def test_a_policy_that_is_not_the_reference_is_compared_with_it_from_the_start(ranks: Any, tied_llama: Path) -> None:
    (trained,) = train(ranks, Run(str(tied_llama), [batch(1)]), tamper=work.shift_a_weight)
    assert logratio_max(trained.stats[0]) > 1e-3


# Megatron's sums of gradients and its weights from where they were updated.
OVER_REPLICAS = {"c10d::reduce_scatter_tensor_coalesced_", "c10d::allgather_into_tensor_coalesced_"}


def names_in(trace: Path) -> set[str]:
    with gzip.open(trace) as file:
        return {event.get("name", "") for event in json.load(file)["traceEvents"]}


def test_a_profiled_step_computes_the_numbers_of_one_that_is_not(ranks: Any, tied_llama: Path, tmp_path: Path) -> None:
    """On each rank; and its trace shows what a profiler of a GPU shows."""
    plain = Run(str(tied_llama), [batch(1), batch(2, version=1)], axes={"data": 2}, mini_batch_size=4)
    wanted, answers = train(ranks, plain), train(ranks, dataclasses.replace(plain, profiles=str(tmp_path / "profiles")))
    assert [answer.digests for answer in answers] == [answer.digests for answer in wanted]
    measured: dict[str, Any] = {"spans": (), "tokens_per_second": 0.0, "peak_memory_bytes": ()}
    for step, expected in zip(stats_of(answers), stats_of(wanted), strict=True):
        assert dataclasses.replace(step, **measured) == dataclasses.replace(expected, **measured)
    traces = sorted((tmp_path / "profiles").iterdir())
    assert [path.name for path in traces] == [f"step_0000000{n}_rank_{rank}.json.gz" for n in (0, 1) for rank in (0, 1)]
    for path in traces:
        assert {"astar reference", "astar policy", "astar optimizer", "aten::mm", *OVER_REPLICAS} <= names_in(path)


def test_a_replica_alone_copies_neither_gradients_nor_weights(ranks: Any, tied_llama: Path, tmp_path: Path) -> None:
    train(ranks, Run(str(tied_llama), [batch(1)], mini_batch_size=4, profiles=str(tmp_path)))
    names = names_in(tmp_path / "step_00000000_rank_0.json.gz")
    assert "astar optimizer" in names and not names & OVER_REPLICAS


def test_statistics_are_those_of_the_whole_batch_on_any_ranks(ranks: Any, untied_qwen2: Path) -> None:
    batches = [batch(1), batch(2, version=1, shared=0)]
    run = Run(str(untied_qwen2), batches, mini_batch_size=4)
    (wanted,) = train(ranks, run)
    assert "AdamW of torch" in wanted.reason
    assert "no MFU" in wanted.reason
    layouts: tuple[dict[str, Any], ...] = ({"data": 2}, {"tensor": 2}, {"pipeline": 2, "virtual": 3}, {"context": 2})
    for axes in layouts:
        steps = stats_of(train(ranks, dataclasses.replace(run, axes=axes)))
        for step, expected in zip(steps, wanted.stats, strict=True):
            assert step.changed_weights == pytest.approx(expected.changed_weights, abs=1e-3), axes
            for name in ("logprobs", "reference_logprobs", "losses"):
                assert getattr(step, name) == pytest.approx(getattr(expected, name), rel=2e-3, abs=1e-4), (axes, name)
            assert len(step.peak_memory_bytes) == ParallelConfig(**axes).world_size
            assert min(step.peak_memory_bytes) > 0
            assert step.tokens_per_second > 0
            assert step.mfu is None
        assert steps[1].model_flops == wanted.stats[1].model_flops  # nothing shared, so packs are no matter
