"""The health of a step: estimators against what they estimate, on a tabular policy whose KL and entropy are known."""

import math
from types import SimpleNamespace

import pytest
import samples
import torch

from astar_megatron.algorithm.astar import Astar
from astar_megatron.algorithm.metrics import LogprobSums, divergence
from astar_megatron.algorithm.refresh import LiveVStar
from astar_megatron.config import AstarConfig
from astar_megatron.types import Prompt

PROMPT = Prompt(uid="a", token_ids=(1,), text="", answer="")


def _health(
    logprob: torch.Tensor, reference: torch.Tensor, advantage: torch.Tensor, lengths: torch.Tensor, on_policy: int
) -> SimpleNamespace:
    """A*PO's metrics of a step, with V* = 0."""
    rollouts = [
        samples.rollout(PROMPT, token_ids=(2,) * int(length), reward=float(reward))
        for reward, length in zip(advantage, lengths, strict=True)
    ]
    objective = Astar(AstarConfig(beta2=0.25), LiveVStar({"a": 0.0}, {"a": 4}, 0.5, None))
    columns = objective.columns(rollouts).sequences
    sums = LogprobSums(logprobs=logprob, reference=reference, on_policy=on_policy)
    return SimpleNamespace(**objective.metrics(rollouts, columns, sums))


def test_kl_and_entropy_converge_to_those_of_the_policy() -> None:
    """Responses of 3 independent tokens from 7: 200,000 samples, errors far below the values."""
    random = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 7, generator=random, dtype=torch.float64).log_softmax(-1)
    tokens = torch.multinomial(policy.exp(), 600_000, replacement=True, generator=random).view(-1, 3)
    count = len(tokens)
    estimate = divergence(policy[tokens].sum(1), reference[tokens].sum(1), torch.full((count,), 3), count)
    kl = float((policy.exp() * (policy - reference)).sum())
    assert kl > 0.1
    assert estimate["kl_token"] == pytest.approx(kl, rel=0.02)
    assert estimate["kl_sequence"] == pytest.approx(3 * kl, rel=0.02)
    assert estimate["entropy"] == pytest.approx(-float((policy.exp() * policy).sum()), rel=0.01)


def test_every_number_is_the_one_its_name_says() -> None:
    logprob = torch.tensor([-4.0, -1.0, -9.0, -2.0, -6.0], dtype=torch.float64)
    reference = torch.tensor([-5.0, -3.0, -8.0, -2.0, -3.0], dtype=torch.float64)  # D = 1, 2, -1, 0, -3
    advantage = torch.tensor([0.5, 1.0, 0.0, 0.25, -0.25], dtype=torch.float64)
    health = _health(logprob, reference, advantage, torch.tensor([2, 1, 6, 1, 4]), on_policy=3)
    assert health.logratio_mean == pytest.approx(-0.2)
    assert health.logratio_std == pytest.approx(math.sqrt(15 / 5 - 0.04))
    assert (health.logratio_p05, health.logratio_p50, health.logratio_p95) == pytest.approx((-2.6, 0.0, 1.8))
    assert health.logratio_max == 3.0
    assert health.kl_sequence == pytest.approx(2 / 3)  # of the first three
    assert health.kl_token == pytest.approx(2 / 9)
    assert health.entropy == pytest.approx(14 / 9)
    assert health.residual_mean == pytest.approx((-0.25 - 0.5 - 0.25 - 0.25 - 0.5) / 5)
    assert health.residual_std == pytest.approx(math.sqrt((3 * 0.25**2 + 2 * 0.5**2) / 5 - 0.35**2))
    assert 0 < health.slope < 1
    assert 0 < health.r_squared < 1


def test_one_sequence_and_responses_of_no_token_have_numbers_or_nan() -> None:
    logprob = torch.tensor([-2.0], dtype=torch.float64)
    health = _health(logprob, logprob, torch.tensor([0.5], dtype=torch.float64), torch.tensor([0]), on_policy=1)
    assert (health.logratio_mean, health.logratio_std, health.logratio_max) == (0.0, 0.0, 0.0)
    assert math.isnan(health.entropy)
    assert math.isnan(health.kl_token)
    assert math.isnan(health.slope)


def test_what_is_not_finite_shows() -> None:
    logprob = torch.tensor([-2.0, math.nan, -1.0], dtype=torch.float64)
    health = _health(
        logprob, torch.zeros_like(logprob), torch.arange(3.0).double(), torch.tensor([2, 3, 1]), on_policy=3
    )
    assert math.isnan(health.logratio_mean)
    assert math.isnan(health.logratio_p50)
    assert math.isnan(health.residual_mean)
    assert math.isnan(health.slope)
