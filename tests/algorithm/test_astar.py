"""The loss: properties (i), (ii), (iii) and (vii) of the design, on random tensors and tabular softmax policies.

Legend: X prompts, Y responses of the tabular policy (each response is one action).
"""

import math

import pytest
import torch

from astar_megatron.algorithm.astar import astar_loss, importance_weight, residual, weights_of
from astar_megatron.algorithm.metrics import regression
from astar_megatron.algorithm.value import v_star

X, Y = 5, 7


def _expected_loss(
    logits: torch.Tensor, reference: torch.Tensor, advantage: torch.Tensor, beta2: float
) -> torch.Tensor:
    """The loss under samples of the policy itself, exactly: sum over y of pi(y), held constant, times loss(y)."""
    logprob = logits.log_softmax(-1)  # [X, Y]
    loss = astar_loss(logprob.flatten(), reference.flatten(), advantage.flatten(), beta2)
    return (logprob.detach().exp().flatten() * loss).sum() / X


def _problem(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(X, Y, generator=random, dtype=torch.float64).requires_grad_()
    reference = torch.randn(X, Y, generator=random, dtype=torch.float64).log_softmax(-1)
    rewards = torch.rand(X, Y, generator=random, dtype=torch.float64)
    return logits, reference, rewards


def test_i_loss_and_gradient_equal_the_formula() -> None:
    logprob = torch.randn(16, dtype=torch.float64, requires_grad=True)
    reference, advantage = torch.randn(2, 16, dtype=torch.float64)
    loss = astar_loss(logprob, reference, advantage, beta2=0.3)
    wanted = 0.3 * (logprob - reference) - advantage
    torch.testing.assert_close(residual(logprob, reference, advantage, 0.3), wanted)
    torch.testing.assert_close(loss, wanted**2)
    (gradient,) = torch.autograd.grad(loss.sum(), logprob)
    torch.testing.assert_close(gradient, 2 * 0.3 * wanted)


@pytest.mark.parametrize("seed", range(3))
def test_ii_the_expected_gradient_is_that_of_the_kl_objective_for_any_v(seed: int) -> None:
    logits, reference, rewards = _problem(seed)
    beta2 = 0.2
    logprob = logits.log_softmax(-1)
    probability = logprob.exp()
    objective = (probability * (rewards - beta2 * (logprob - reference))).sum() / X
    (wanted,) = torch.autograd.grad(objective, logits)
    for value in (torch.zeros(X, 1), torch.randn(X, 1) * 10, v_star(rewards, 0.5)[:, None]):
        (gradient,) = torch.autograd.grad(_expected_loss(logits, reference, rewards - value, beta2), logits)
        torch.testing.assert_close(gradient, -2 * beta2 * wanted)


def test_iii_the_loss_is_zero_at_the_optimum_and_training_converges_to_it() -> None:
    logits, reference, rewards = _problem(0)
    beta = 0.5
    value = beta * torch.logsumexp(reference + rewards / beta, dim=-1, keepdim=True)  # exact V*, [X, 1]
    optimum = reference + (rewards - value) / beta
    torch.testing.assert_close(optimum.exp().sum(-1), torch.ones(X, dtype=torch.float64))
    loss = astar_loss(optimum.flatten(), reference.flatten(), (rewards - value).flatten(), beta)
    assert float(loss.max()) < 1e-25
    for _ in range(1000):  # gradient descent; 1 / (2 * beta^2) undoes the scale of the loss's curvature
        (gradient,) = torch.autograd.grad(_expected_loss(logits, reference, rewards - value, beta), logits)
        with torch.no_grad():
            logits -= X / (2 * beta**2) * gradient
    torch.testing.assert_close(logits.log_softmax(-1), optimum, rtol=0, atol=1e-4)


def test_iii_v_star_of_samples_in_the_reference_s_proportions_is_exact() -> None:
    counts = torch.tensor([1, 2, 5])  # pi_ref = counts / 8
    rewards = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    exact = 0.5 * torch.logsumexp((counts / 8).log() + rewards / 0.5, dim=-1)
    torch.testing.assert_close(v_star(rewards.repeat_interleave(counts), 0.5), exact)


def test_vii_the_importance_weight_is_one_where_rollout_and_trainer_agree() -> None:
    logprob = torch.tensor([-3.0, -700.5, 0.0], requires_grad=True)
    weight = importance_weight(logprob, logprob.detach().clone(), cap=1.0)
    assert weight.tolist() == [1.0, 1.0, 1.0]
    assert not weight.requires_grad


def test_the_importance_weight_is_the_ratio_up_to_the_cap() -> None:
    train = torch.tensor([-1.0, 500.0, -900.0], dtype=torch.float64)
    weight = importance_weight(train, torch.tensor([-1.5, -500.0, 0.0], dtype=torch.float64), cap=2.0)
    torch.testing.assert_close(weight, torch.tensor([2.718281828**0.5, 2.0, 0.0], dtype=torch.float64))


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(4,\), \(4, 1\), \(4,\)"):
        astar_loss(torch.zeros(4), torch.zeros(4, 1), torch.zeros(4), 1e-3)
    with pytest.raises(ValueError, match="one shape"):
        importance_weight(torch.zeros(4), torch.zeros(1), cap=2)
    with pytest.raises(ValueError, match="cap of at least 1"):
        importance_weight(torch.zeros(4), torch.zeros(4), cap=0.5)
    with pytest.raises(ValueError, match="beta2"):
        astar_loss(torch.zeros(4), torch.zeros(4), torch.zeros(4), 0.0)


@pytest.mark.parametrize(
    ("weights", "mean", "share"),
    [
        ([0.7] * 5, 0.7, 1.0),
        ([2.0, 0, 0, 0], 0.5, 0.25),
        ([1e-200, 0, 0], 1e-200 / 3, 1 / 3),
        ([0.0, 0, 0], 0.0, math.nan),
    ],
)
def test_weights_are_worth_as_much_as_so_many_equal_ones(weights: list[float], mean: float, share: float) -> None:
    values = weights_of(torch.tensor(weights, dtype=torch.float64))
    assert values == pytest.approx({"weight_mean": mean, "effective_share": share}, nan_ok=True)


def test_regression_recovers_a_line_and_survives_constants() -> None:
    x = torch.tensor([0.0, 1.0, 2.0])
    line = regression(x, 3 * x + 1)
    assert (line.slope, line.r_squared) == pytest.approx((3, 1))
    flat = regression(x, torch.zeros(3))  # step 0: every log-ratio is 0
    assert (flat.slope, flat.r_squared) == (0, 0)
    undefined = regression(torch.ones(3), x)
    assert undefined.slope != undefined.slope
    with pytest.raises(ValueError, match="B >= 1"):
        regression(torch.zeros(0), torch.zeros(0))
