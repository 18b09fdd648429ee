"""Ranks form the gradient of each method's loss, in every layout, as autograd on full logits does.

Two mini-batches: at the second one the policy is no longer the one before the step, nor the reference.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import ranks as work
import torch
from method_formulas import METHODS, Method, Tokens
from ranks import Job
from safetensors.torch import load_file
from test_layouts import batch
from torch import Tensor
from transformers import AutoModelForCausalLM

from astar_megatron.algorithm.objective import ResponseTokens
from astar_megatron.types import RolloutBatch

LAYOUTS: list[dict[str, Any]] = [
    {},
    {"tensor": 2, "pipeline": 2},
    {"context": 2, "data": 2},
    {"tensor": 2, "context": 2},
    {"pipeline": 3},
    {"pipeline": 2, "virtual": 3},
    {"data": 4},
    {"tensor": 2, "data": 2},
    {"context": 2, "pipeline": 2, "recompute": "full"},
]
HALF = 4


def cases() -> Iterator[Any]:
    """Every method in every layout, tied and untied; but for a few all of them are slow."""
    for name, (number, axes), kind in itertools.product(METHODS, enumerate(LAYOUTS), ("tied_llama", "untied_qwen2")):
        one_rank = number == 0 and kind == "tied_llama"
        shared = name in ("grpo", "rebel") and (number, kind) in ((1, "untied_qwen2"), (2, "tied_llama"))
        marks = () if one_rank or shared else pytest.mark.slow
        yield pytest.param(name, axes, kind, marks=marks, id=f"{name}-{kind}-{axes}")


def rows_of(folder: Path, data: RolloutBatch) -> tuple[Any, list[Tensor]]:
    """The model as plain transformers, and the log-probs [r] of each response's tokens under it."""
    model, rows = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), []
    for ids, prompt in zip(data.token_ids, data.prompt_tokens, strict=True):
        logits = model(torch.tensor([ids])).logits[0] / 0.8
        rows.append(logits.log_softmax(-1)[torch.arange(prompt - 1, len(ids) - 1), torch.tensor(ids[prompt:])])
    return model, rows


def with_columns(method: Method, data: RolloutBatch, rows: Sequence[Tensor]) -> RolloutBatch:
    """The batch with columns at random: of both signs, and near `rows` where they stand for log-probs."""
    random = torch.Generator().manual_seed(7)
    near = [row.detach().double() + 0.15 * torch.randn(len(row), generator=random).double() for row in rows]
    rewards = torch.rand(len(data), generator=random, dtype=torch.float64)
    peer = torch.arange(len(data)) ^ 1
    columns = {
        "advantage": torch.randn(len(data), generator=random, dtype=torch.float64),
        "reward": rewards,
        "v_star": torch.rand(len(data), generator=random, dtype=torch.float64),
        "token_weight": torch.rand(len(data), generator=random, dtype=torch.float64) + 0.1,
        "rollout_logprob": torch.stack([row.sum() for row in near]),
        "engine_logprob": torch.stack([row.sum() for row in near]),
        "peer": peer,
        "peer_reward": rewards[peer],
    }
    token_columns = {
        "token_advantage": torch.randn(data.response_tokens(), generator=random, dtype=torch.float64),
        "engine_logprob": torch.cat(near),
    }
    return dataclasses.replace(
        data,
        columns={name: columns[name] for name in method.columns},
        token_columns={name: token_columns[name] for name in method.token_columns},
    )


def losses_of(method: Method, data: RolloutBatch, responses: Sequence[Tokens], part: slice) -> Tensor:
    """The losses of a part of the batch by the formula."""
    lengths = data.response_lengths().tolist()
    of_tokens = {name: column.split(lengths)[part] for name, column in data.token_columns.items()}
    return method.formula(responses, {name: column[part] for name, column in data.columns.items()} | of_tokens)


@pytest.mark.parametrize(("name", "axes", "kind"), list(cases()))
def test_the_gradient_of_each_method_is_autograds_on_full_logits(
    name: str, axes: dict[str, Any], kind: str, ranks: Any, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder, method = request.getfixturevalue(kind), METHODS[name]
    job = Job(str(folder), loss=method.loss, **axes)
    _, before = rows_of(folder, batch(7))
    data = with_columns(method, batch(7), before)
    first = dataclasses.replace(
        data,
        token_ids=data.token_ids[:HALF],
        prompt_tokens=data.prompt_tokens[:HALF],
        columns={key: column[:HALF] for key, column in data.columns.items()},
        token_columns={
            key: column[: data.response_lengths()[:HALF].sum()] for key, column in data.token_columns.items()
        },
    )
    here = {"world": job.world_size, "job": job}
    ranks.run(work.gradients, **here, batch=first, folder=str(tmp_path / "first"), shared=str(tmp_path))
    answers = ranks.run(work.gradients, **here, batch=data, folder=str(tmp_path / "whole"), size=HALF)
    stats = next(report for report in answers if report is not None)

    model, after = rows_of(tmp_path / "first" / "weights", data)
    old = [row.detach() for row in before]
    responses = [Tokens(now, row, row) for now, row in zip([*old[:HALF], *after[HALF:]], old, strict=True)]
    halves = [losses_of(method, data, responses[part], part) for part in (slice(0, HALF), slice(HALF, None))]
    moved = max(float((now.sum() - row.sum()).abs()) for now, row in zip(after, old, strict=True))
    assert moved > 0.1  # nats
    assert stats.losses == pytest.approx(torch.cat(halves).tolist(), rel=1e-4, abs=2e-5)
    loss = halves[1][::2].mean() if method.of_pairs else halves[1].mean()
    loss.backward()
    computed = load_file(tmp_path / "whole" / "model.safetensors")
    wanted = {key: parameter.grad for key, parameter in model.named_parameters()}
    assert computed.keys() == wanted.keys()
    for key, gradient in wanted.items():
        error = (computed[key] - gradient).abs().max().item()
        assert error <= 1e-5 * max(1.0, float(gradient.abs().max())), key


def test_a_loss_that_does_not_say_what_it_needs_is_not_given_the_log_probs_of_before() -> None:
    tokens = ResponseTokens(
        logprobs=torch.zeros(2), reference_logprobs=torch.zeros(2), lengths=(2,), sum_tokens=lambda values: values
    )
    with pytest.raises(AssertionError, match='does not have "old" among its needs'):
        _ = tokens.old_logprobs
