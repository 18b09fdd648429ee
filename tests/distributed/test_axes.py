"""No axis changes what training computes: every layout against one rank (fp32, real Megatron over gloo)."""

import dataclasses
import itertools
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import ranks as work
import torch
from ranks import Job
from safetensors.torch import load_file
from samples import logratio_max
from test_layouts import batch

TOLERANCE = 1e-6
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2 SP": {"tensor": 2},
    "PP2": {"pipeline": 2},
    "PP3": {"pipeline": 3},
    "PP2 VPP3": {"pipeline": 2, "virtual": 3},
    "CP2": {"context": 2},
    "DP2 overlap": {"data": 2},
    "recompute full": {"recompute": "full"},
    "recompute selective": {"recompute": "selective"},
    "TP2 PP2 SP": {"tensor": 2, "pipeline": 2},
    "TP2 CP2 SP": {"tensor": 2, "context": 2},
    "TP2 DP2 SP overlap": {"tensor": 2, "data": 2},
    "PP2 DP2 overlap": {"pipeline": 2, "data": 2},  # a tied head is gathered by itself, on another stage
}
SPLITS: dict[str, dict[str, Any]] = {
    "a sequence a micro-batch": {"micro_batch_tokens": 1},
    "one micro-batch": {"micro_batch_tokens": 10_000},
    "CP2, one micro-batch": {"context": 2, "micro_batch_tokens": 10_000},
}
EXPERT_LAYOUTS: dict[str, dict[str, Any]] = {
    "DP2": {"data": 2},
    "EP2 over DP2": {"data": 2, "expert": 2},
    "EP2 over CP2": {"context": 2, "expert": 2},
    "TP2 EP2 SP": {"tensor": 2, "data": 2, "expert": 2},
}
RARE_LAYOUTS: dict[str, dict[str, Any]] = {
    "CP2 DP2": {"context": 2, "data": 2},
    "CP2 PP2 VPP3, full": {"context": 2, "pipeline": 2, "virtual": 3, "recompute": "full"},
    "CP4": {"context": 4},
    "PP3 CP2": {"pipeline": 3, "context": 2},
    "TP2 PP2 VPP3 DP2": {"tensor": 2, "pipeline": 2, "virtual": 3, "data": 2},
    "TP2 CP2 PP2": {"tensor": 2, "context": 2, "pipeline": 2, "micro_batch_tokens": 1},
}
RARE_EXPERT_LAYOUTS: dict[str, dict[str, Any]] = {
    "PP2 EP2": {"pipeline": 2, "data": 2, "expert": 2},
    "EP2 of DP4": {"data": 4, "expert": 2, "recompute": "full"},
    "PP3 VPP2 CP2 EP2": {"pipeline": 3, "virtual": 2, "context": 2, "expert": 2},
    "TP2 EP2 over CP2": {"tensor": 2, "context": 2, "expert": 2, "recompute": "selective"},
}


@pytest.fixture(scope="module")
def one_rank(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Any]:
    """What one rank computes for a model folder, computed once."""
    return cache(lambda folder: run(ranks, tmp_path_factory.mktemp("one"), job_of(folder)))


def job_of(folder: Path, **layout: Any) -> Job:
    """A large epsilon: without it Adam makes steps of full size out of gradients that are rounding errors."""
    return Job(str(folder), adam_eps=1e-3, **layout)


def batches() -> list[Any]:
    return [batch(3), batch(4, version=1)]


def run(ranks: Any, tmp_path: Path, job: Job, save: Path | None = None) -> tuple[list[Any], dict[str, dict[str, Any]]]:
    """The statistics of two steps (three optimiser steps), and the tensors of each folder that was written."""
    arguments = {"batches": batches(), "folder": str(tmp_path), "shared": str(tmp_path), "save": save and str(save)}
    answers = ranks.run(work.trained, job.world_size, job=job, **arguments)
    reports = [stats for stats in answers if stats[0] is not None]
    assert len(reports) == 1  # one rank reports, whatever the axes
    folders = ("gradients0", "gradients1", "weights")
    return reports[0], {name: load_file(tmp_path / name / "model.safetensors") for name in folders}


def assert_same(actual: Any, wanted: Any) -> None:
    """Losses, gradients and weights of `found` are those of `wanted`; the first step knows no log-ratio at all."""
    (first, second), tensors = actual
    (_, expected), expected_tensors = wanted
    assert logratio_max(first) == 0.0
    assert logratio_max(expected) > 0.01  # the first step did move the policy
    assert logratio_max(second) == pytest.approx(logratio_max(expected), abs=2e-5)
    assert first.token_logprobs == first.reference_token_logprobs
    for name in ("token_logprobs", "reference_token_logprobs"):
        assert list(getattr(second, name)) == pytest.approx(list(getattr(expected, name)), abs=2e-5)
    starts = [0, *itertools.accumulate(batches()[1].response_lengths().tolist())]
    sums = [sum(second.token_logprobs[start:end]) for start, end in itertools.pairwise(starts)]
    assert sums == pytest.approx(list(second.logprobs), abs=1e-4)
    assert second.loss == pytest.approx(expected.loss, abs=TOLERANCE)
    assert second.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
    for folder, parameters in expected_tensors.items():
        assert set(tensors[folder]) == set(parameters)
        assert max(float(parameter.abs().max()) for parameter in parameters.values()) > 1e-3
        for name, parameter in parameters.items():
            worst = (tensors[folder][name] - parameter).abs().max().item()
            assert worst <= TOLERANCE, f"{folder}, {name}: {worst}"


@pytest.fixture(scope="module")
def experts(tiny_family: Callable[..., Path]) -> Path:
    return tiny_family("qwen3_moe")


def _cases(kind: str, layouts: dict[str, dict[str, Any]], *marks: pytest.MarkDecorator) -> list[Any]:
    return [pytest.param(kind, layout, id=f"{name}-{kind}", marks=marks) for name, layout in layouts.items()]


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        *_cases("tied_llama", LAYOUTS | SPLITS),
        *_cases("untied_qwen2", LAYOUTS),
        *_cases("experts", EXPERT_LAYOUTS),
        *_cases("tied_llama", RARE_LAYOUTS, pytest.mark.slow),
        *_cases("experts", RARE_EXPERT_LAYOUTS, pytest.mark.slow),
    ],
)
def test_every_axis_and_every_micro_batch_computes_what_one_rank_does(
    kind: str, layout: dict[str, Any], ranks: Any, one_rank: Any, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(kind)
    assert_same(run(ranks, tmp_path, job_of(folder, **layout)), one_rank(folder))


def test_norms_of_heads_get_the_gradients_of_all_tensor_ranks(
    ranks: Any, one_rank: Any, tiny_family: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_family("qwen3", tie_word_embeddings=True)
    assert_same(run(ranks, tmp_path, job_of(folder, tensor=2)), one_rank(folder))


def test_the_order_of_sequences_is_no_part_of_the_gradient(ranks: Any, tied_llama: Path, tmp_path: Path) -> None:
    data = batch(3)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(1))
    turned = dataclasses.replace(
        data,
        token_ids=tuple(data.token_ids[i] for i in order),
        prompt_tokens=tuple(data.prompt_tokens[i] for i in order),
        columns={name: column[order] for name, column in data.columns.items()},
    )
    gradients = []
    for name, sequences in (("given", data), ("turned", turned)):
        folder = tmp_path / name
        ranks.run(work.gradients, 2, job=Job(str(tied_llama), context=2), batch=sequences, folder=str(folder))
        gradients.append(load_file(folder / "model.safetensors"))
    for name, gradient in gradients[0].items():
        assert (gradients[1][name] - gradient).abs().max().item() <= TOLERANCE, name


@pytest.fixture(scope="module")
def four_steps(ranks: Any) -> Callable[[Path], list[float]]:
    """The losses of the third and fourth step of one rank that nobody interrupts, computed once a model folder."""

    def trained(folder: Path) -> list[float]:
        arguments = {"batches": batches() + later_batches(), "load": None, "save": None}
        (reports,) = ranks.run(work.steps, 1, job=job_of(folder), **arguments)
        return [stats.loss for stats in reports[2:]]

    return cache(trained)


def later_batches() -> list[Any]:
    return [batch(5, version=2), batch(6, version=3)]


@pytest.mark.parametrize(
    ("kind", "saved", "loaded"),
    [
        ("tied_llama", {"pipeline": 2, "virtual": 3}, {"context": 2}),
        ("tied_llama", {"pipeline": 2}, {"pipeline": 2}),
        ("tied_llama", {"pipeline": 2, "data": 2}, {"tensor": 2, "pipeline": 2}),
        ("experts", {"data": 2, "expert": 2}, {}),
        pytest.param("tied_llama", {}, {"pipeline": 3, "context": 2}, marks=pytest.mark.slow),
        pytest.param("tied_llama", {"pipeline": 3, "tensor": 2}, {"pipeline": 2, "virtual": 3}, marks=pytest.mark.slow),
        pytest.param("untied_qwen2", {"context": 2}, {"pipeline": 2, "virtual": 3}, marks=pytest.mark.slow),
        pytest.param("experts", {}, {"context": 2, "expert": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_goes_on_in_another_layout(
    kind: str,
    saved: dict[str, Any],
    loaded: dict[str, Any],
    ranks: Any,
    four_steps: Callable[[Path], list[float]],
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    """The step after: its loss says that the weights are the same, its successor's that Adam's state is."""
    folder = request.getfixturevalue(kind)
    checkpoint = str(tmp_path / "step_00000002")
    job = job_of(folder, **saved)
    ranks.run(work.steps, job.world_size, job=job, batches=batches(), load=None, save=checkpoint)
    job = job_of(folder, **loaded)
    answers = ranks.run(work.steps, job.world_size, job=job, batches=later_batches(), load=checkpoint, save=None)
    losses = next([stats.loss for stats in reports] for reports in answers if reports[0] is not None)
    assert losses == pytest.approx(four_steps(folder), abs=TOLERANCE)
