"""The critic on ranks: values and gradients as plain transformers has them, the same numbers in every layout."""

import dataclasses
from pathlib import Path
from typing import Any

import critic_ranks
import pytest
import torch
from ranks import Job
from safetensors.torch import load_file
from test_layouts import batch
from transformers import AutoModelForCausalLM

from astar_megatron.algorithm.clipped import ClippedLoss
from astar_megatron.algorithm.ppo import PpoLoss, ValueLoss, advantages_and_returns
from astar_megatron.types import RolloutBatch

LOSS = PpoLoss(
    policy=ClippedLoss(clip_low=0.1, clip_high=0.2, kl_coef=0.05),
    value=ValueLoss(clip=0.3),
    gamma=0.98,
    gae_lambda=0.9,
)
LAYOUTS = [
    {"tensor": 2, "pipeline": 2},
    pytest.param({"context": 2, "data": 2}, marks=pytest.mark.slow),
    pytest.param({"pipeline": 3}, marks=pytest.mark.slow),
    pytest.param({"pipeline": 2, "virtual": 3}, marks=pytest.mark.slow),
    pytest.param({"tensor": 2, "data": 2}, marks=pytest.mark.slow),
]


def data_of(seed: int, version: int = 0) -> RolloutBatch:
    random = torch.Generator().manual_seed(seed)
    data = batch(seed, version=version)
    count, tokens = len(data), data.response_tokens()
    columns = {
        "reward": torch.rand(count, generator=random, dtype=torch.float64),
        "token_weight": 1 / data.response_lengths().double(),
    }
    token_columns = {
        "return": torch.rand(tokens, generator=random, dtype=torch.float64),
        "old_value": torch.rand(tokens, generator=random, dtype=torch.float64),
    }
    return dataclasses.replace(data, columns=columns, token_columns=token_columns)


@pytest.mark.parametrize("kind", ["tied_llama", "untied_qwen2"])
@pytest.mark.parametrize("axes", [{}, *LAYOUTS], ids=str)
def test_values_and_the_gradient_of_the_critic_are_autograds(
    axes: dict[str, Any], kind: str, ranks: Any, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder, data = request.getfixturevalue(kind), data_of(3)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    head = (0.3 * torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(9))).requires_grad_()
    job = Job(str(folder), loss=LOSS, critic_lr=1e-3, **axes)
    answers = ranks.run(
        critic_ranks.values_and_gradient,
        job.world_size,
        job=job,
        batch=data,
        head=head.tolist(),
        folder=str(tmp_path / "critic"),
    )
    rows = []
    for ids, prompt in zip(data.token_ids, data.prompt_tokens, strict=True):
        hidden = model.model(torch.tensor([ids])).last_hidden_state[0]
        rows.append(hidden[prompt - 1 : len(ids) - 1] @ head)
    for values, _ in answers:
        assert values == pytest.approx(torch.cat(rows).tolist(), abs=1e-5, rel=1e-4)
    lengths = data.response_lengths().tolist()
    losses = []
    for values, old, target in zip(
        rows, *(data.token_columns[name].split(lengths) for name in ("old_value", "return")), strict=True
    ):
        terms = [
            max((v - r) ** 2, (min(max(v, o - 0.3), o + 0.3) - r) ** 2, key=lambda term: float(term.detach())) / 2
            for v, o, r in zip(values, old, target, strict=True)
        ]
        losses.append(torch.stack(terms).mean())
    torch.stack(losses).mean().backward()
    computed = load_file(tmp_path / "critic" / "model.safetensors")
    for name, parameter in model.named_parameters():
        wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        error = (computed[name] - wanted).abs().max().item()
        assert error <= 1e-5 * max(1.0, float(wanted.abs().max())), name
    for heads in (heads for _, heads in answers):
        assert heads and head.grad is not None
        for gradient in heads:
            assert gradient == pytest.approx(head.grad.tolist(), abs=1e-5, rel=1e-4)


def steps(ranks: Any, job: Job, batches: list[RolloutBatch], *, save: Path | str = "", load: Path | str = "") -> Any:
    answers = ranks.run(
        critic_ranks.learns, job.world_size, job=job, batches=batches, size=4, save=str(save), load=str(load)
    )
    return next(reports for reports in answers if reports[0] is not None)


@pytest.mark.parametrize("axes", LAYOUTS, ids=str)
def test_steps_have_the_same_numbers_in_every_layout_and_after_a_checkpoint(
    axes: dict[str, Any], ranks: Any, untied_qwen2: Path, tmp_path: Path
) -> None:
    batches = [data_of(seed, version=seed) for seed in range(3)]
    job = Job(str(untied_qwen2), loss=LOSS, critic_lr=1e-3, lr=1e-4, adam_eps=1e-3)
    alone = steps(ranks, job, batches, save=tmp_path / "one_rank")
    shared = steps(ranks, dataclasses.replace(job, **axes), batches, save=tmp_path / "ranks")
    for report, other in zip(alone, shared, strict=True):
        assert other.losses == pytest.approx(report.losses, rel=1e-3, abs=1e-4)
        assert other.critic == pytest.approx(report.critic, rel=1e-3)
    (resumed,) = steps(ranks, dataclasses.replace(job, **axes), batches, load=tmp_path / "one_rank")
    assert resumed.losses == pytest.approx(alone[-1].losses, rel=1e-3, abs=1e-4)
    assert resumed.critic == pytest.approx(alone[-1].critic, rel=1e-3)
    assert alone[2].critic["critic_loss"] < alone[0].critic["critic_loss"]


def test_a_critic_of_bfloat16_is_dithered_but_for_its_head(ranks: Any, tied_llama: Path) -> None:
    job = Job(str(tied_llama), loss=LOSS, critic_lr=1e-3, dtype="bfloat16")
    first, second = steps(ranks, job, [data_of(0), data_of(1, version=1)])
    assert first.critic["critic_skipped_steps"] == second.critic["critic_skipped_steps"] == 0.0
    assert first.critic["critic_grad_norm"] > 0


@pytest.mark.parametrize("axes", [{}, pytest.param({"tensor": 2, "pipeline": 2}, marks=pytest.mark.slow)], ids=str)
def test_a_reference_that_is_a_copy_goes_on_from_a_checkpoint_wherever_it_lies(
    axes: dict[str, Any], ranks: Any, untied_qwen2: Path, tmp_path: Path
) -> None:
    batches = [batch(seed, version=seed) for seed in range(3)]
    job = Job(str(untied_qwen2), **axes)

    def run(place: str, **folders: str) -> Any:
        placed = dataclasses.replace(job, reference=place)
        paths = {"save": "", "load": ""} | folders
        answers = ranks.run(critic_ranks.copies, job.world_size, job=placed, batches=batches, **paths)
        return next(reports for reports in answers if reports[0] is not None)[-1]

    saved = str(tmp_path / "saved")
    whole = run("resident", save=saved)
    assert whole.reference_logprobs != whole.logprobs
    for place in ("resident", "offload"):
        resumed = run(place, load=saved)
        assert resumed.losses == whole.losses and resumed.reference_logprobs == whole.reference_logprobs
    assert run("offload", save=saved + "_2").losses == whole.losses


def test_advantages_are_the_sums_that_the_paper_has() -> None:
    rewards, lengths = torch.tensor([1.0, 0.25], dtype=torch.float64), [3, 2]
    values = torch.tensor([0.5, 0.25, 0.75, 0.1, 0.2], dtype=torch.float64)
    advantage, target = advantages_and_returns(rewards, values, lengths, gamma=0.5, gae_lambda=0.25)
    deltas = [[0.5 * 0.25 - 0.5, 0.5 * 0.75 - 0.25, 1 - 0.75], [0.5 * 0.2 - 0.1, 0.25 - 0.2]]
    wanted = []
    for row in deltas:
        wanted += [sum(0.125 ** (k - t) * row[k] for k in range(t, len(row))) for t in range(len(row))]
    assert advantage.tolist() == pytest.approx(wanted)
    assert target.tolist() == pytest.approx((advantage + values).tolist())
    plain, _ = advantages_and_returns(rewards, values, lengths, gamma=1.0, gae_lambda=1.0)
    assert plain.tolist() == pytest.approx([0.5, 0.75, 0.25, 0.15, 0.05])  # the reward minus the value
