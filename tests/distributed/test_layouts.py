"""Megatron's numbers are transformers' numbers, and training goes on from checkpoints (fp32, real Megatron, gloo)."""

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import ranks as work
import torch
from ranks import Job
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from astar_megatron.types import RolloutBatch

MODELS = ["tied_llama", "untied_qwen2"]


def sequences(seed: int, count: int, shared: int) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]:
    """Ragged sequences that begin with `shared` common tokens, and their prompt lengths."""
    rng = random.Random(seed)
    head = [rng.randrange(3, 200) for _ in range(shared)]
    token_ids, prompt_tokens = [], []
    for _ in range(count):
        prompt = head + [rng.randrange(3, 200) for _ in range(rng.randrange(1, 7))]
        response = [rng.randrange(3, 200) for _ in range(rng.randrange(1, 12))]
        token_ids.append((*prompt, *response))
        prompt_tokens.append(len(prompt))
    return tuple(token_ids), tuple(prompt_tokens)


def batch(seed: int, count: int = 8, version: int = 0, shared: int = 5) -> RolloutBatch:
    token_ids, prompt_tokens = sequences(seed, count, shared)
    generator = torch.Generator().manual_seed(seed)
    return RolloutBatch(
        token_ids=token_ids,
        prompt_tokens=prompt_tokens,
        columns={
            "reward": torch.rand(count, generator=generator, dtype=torch.float64),
            "v_star": torch.rand(count, generator=generator, dtype=torch.float64),
            "rollout_logprob": torch.zeros(count, dtype=torch.float64),
        },
        version=version,
    )


def run_gradients(ranks: Any, tmp_path: Path, job: Job, data: RolloutBatch, name: str) -> tuple[dict[str, Any], Any]:
    answers = ranks.run(work.gradients, job.world_size, job=job, batch=data, folder=str(tmp_path / name))
    stats = next(report for report in answers if report is not None)
    folder = tmp_path / name / "model.safetensors"
    return (load_file(folder) if folder.exists() else {}), stats


def expected_step(folder: Path, data: RolloutBatch) -> tuple[float, dict[str, Any]]:
    """The loss and its gradient by the formula, sequence by sequence, with plain transformers at step 0."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    losses = []
    columns = data.columns["reward"], data.columns["v_star"]
    for ids, prompt, reward, value in zip(data.token_ids, data.prompt_tokens, *columns, strict=True):
        logits = model(torch.tensor([ids])).logits[0] / 0.8
        rows = logits.log_softmax(-1)[torch.arange(prompt - 1, len(ids) - 1), torch.tensor(ids[prompt:])]
        logprob = rows.sum()
        losses.append((0.05 * (logprob - logprob.detach()) - (reward - value).float()) ** 2)
    loss = torch.stack(losses).mean()
    loss.backward()
    return float(loss), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("shared", [0, 5])
def test_token_logprobs_equal_transformers(kind: str, shared: int, ranks: Any, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    token_ids, prompt_tokens = sequences(1, 9, shared)
    (rows,) = ranks.run(work.logprobs, 1, job=Job(str(folder)), token_ids=token_ids, prompt_tokens=prompt_tokens)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for ids, prompt, row in zip(token_ids, prompt_tokens, rows, strict=True):
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        wanted = [float(logprobs[t - 1, ids[t]]) for t in range(prompt, len(ids))]
        assert row == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_loss_and_gradient_equal_the_formula(
    kind: str, ranks: Any, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(kind)
    data = batch(2)
    computed, stats = run_gradients(ranks, tmp_path, Job(str(folder)), data, "one")
    loss, wanted = expected_step(folder, data)
    assert stats.loss == pytest.approx(loss, abs=1e-6)
    assert set(computed) == set(wanted)
    for name, gradient in wanted.items():
        torch.testing.assert_close(
            computed[name], gradient, atol=2e-6, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("layout", [{}, {"tensor": 2}, {"context": 2}], ids=["one rank", "tensor", "context"])
def test_a_micro_batch_without_any_token_changes_no_number(
    layout: dict[str, Any], ranks: Any, tied_llama: Path, tmp_path: Path
) -> None:
    """Of one-token prompts with empty responses: alone in a forward pass they leave it no token."""
    full = batch(2)
    empty = (full.token_ids[0][:1], full.token_ids[1][:1], *full.token_ids[2:])
    data = dataclasses.replace(full, token_ids=empty, prompt_tokens=(1, 1, *full.prompt_tokens[2:]))
    job = Job(str(tied_llama), micro_batch_tokens=1000)
    wanted, expected = run_gradients(ranks, tmp_path, job, data, "together")
    alone = dataclasses.replace(job, micro_batch_tokens=1, **layout)
    computed, stats = run_gradients(ranks, tmp_path, alone, data, "alone")
    assert stats.loss == pytest.approx(expected.loss, abs=1e-6)
    for name, gradient in wanted.items():
        torch.testing.assert_close(computed[name], gradient, atol=2e-6, rtol=1e-5)


def test_a_resumed_run_takes_the_learning_rate_of_its_configuration(
    ranks: Any, tied_llama: Path, tmp_path: Path
) -> None:
    single = Job(str(tied_llama))
    batches = [batch(20 + version, version=version) for version in range(3)]
    checkpoint = str(tmp_path / "step_00000001")
    ranks.run(work.steps, 1, job=single, batches=batches[:1], load=None, save=checkpoint)
    moved = []
    for lr in (1e-3, 1e-9):
        job = dataclasses.replace(single, lr=lr)
        (reports,) = ranks.run(work.steps, 1, job=job, batches=batches[1:], load=checkpoint, save=None)
        moved.append(reports[1].loss - reports[0].loss)
    assert moved[0] != moved[1]


def test_stale_rollouts_are_refused(ranks: Any, tied_llama: Path) -> None:
    job = Job(str(tied_llama))
    with pytest.raises(AssertionError, match="rollouts of version 3 for weights of version 0"):
        ranks.run(work.steps, 1, job=job, batches=[batch(1, version=3)], load=None, save=None)
