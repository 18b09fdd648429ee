"""Ranks form the gradient of any loss of token log-probs, in every layout as autograd on full logits does."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Job
from ratio_loss import ClippedRatio
from test_layouts import batch, run_gradients
from transformers import AutoModelForCausalLM

from astar_megatron.algorithm.objective import ResponseTokens
from astar_megatron.types import RolloutBatch

LOSS = ClippedRatio()
LAYOUTS: list[Any] = [
    {},
    {"tensor": 2, "pipeline": 2},
    {"context": 2, "data": 2},
    *(
        pytest.param(axes, marks=pytest.mark.slow)
        for axes in (
            {"tensor": 2, "context": 2},
            {"pipeline": 3},
            {"pipeline": 2, "virtual": 3},
            {"data": 4},
            {"context": 2, "pipeline": 2, "recompute": "full"},
        )
    ),
]


def problem(folder: Path, seed: int) -> tuple[RolloutBatch, float, dict[str, Any]]:
    """A batch, and its mean loss and that one's scaled gradient by plain transformers, sequence by sequence.

    Advantages have both signs, and old log-probs are near the model's, so that some ratios are clipped.
    """
    model, data = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), batch(seed)
    rows = []
    for ids, prompt in zip(data.token_ids, data.prompt_tokens, strict=True):
        logits = model(torch.tensor([ids])).logits[0] / 0.8
        rows.append(logits.log_softmax(-1)[torch.arange(prompt - 1, len(ids) - 1), torch.tensor(ids[prompt:])])
    random = torch.Generator().manual_seed(seed)
    olds = [row.detach().double() + 0.3 * torch.randn(len(row), generator=random).double() for row in rows]
    clipped = sum(int((((row - old).exp() - 1).abs() > LOSS.clip).sum()) for row, old in zip(rows, olds, strict=True))
    assert 0 < clipped < data.response_tokens()
    columns = {
        "advantage": torch.randn(len(data), generator=random, dtype=torch.float64),
        "response_tokens": data.response_lengths().double(),
    }
    losses = []
    for index, (row, old) in enumerate(zip(rows, olds, strict=True)):
        tokens = ResponseTokens(
            logprobs=row,
            reference_logprobs=row.detach(),
            lengths=(len(row),),
            sum_tokens=lambda values: values.sum()[None],
        )
        of_one = {name: column[index : index + 1] for name, column in columns.items()}
        losses.append(LOSS(tokens, of_one | {"old_logprob": old}))
    loss = torch.cat(losses).mean()
    (LOSS.gradient_scale * loss).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    data = dataclasses.replace(data, columns=columns, token_columns={"old_logprob": torch.cat(olds)})
    return data, loss.item(), gradients


@pytest.mark.parametrize("kind", ["tied_llama", "untied_qwen2"])
@pytest.mark.parametrize("axes", LAYOUTS, ids=str)
def test_the_gradient_of_a_token_ratio_loss_is_autograds(
    axes: dict[str, Any], kind: str, ranks: Any, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(kind)
    data, loss, wanted = problem(folder, 7)
    computed, stats = run_gradients(ranks, tmp_path, Job(str(folder), loss=LOSS, **axes), data, "found")
    assert stats.loss == pytest.approx(loss, abs=1e-6)  # a mean of both signs
    assert stats.logratio_max == 0.0
    assert computed.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (computed[name] - gradient).abs().max().item() <= 2e-6 * max(1.0, float(gradient.abs().max())), name
