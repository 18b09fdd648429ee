"""V*: property (iv) of the design, limits, masks and bad input."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from astar_megatron.algorithm.value import v_star, v_star_from_pass_rate


def test_iv_v_star_is_finite_where_the_exponential_overflows() -> None:
    rewards = torch.tensor([[1.0, 0.0, 1.0, 0.0], [-1.0, -1.0, -1.0, -1.0]])
    value = v_star(rewards, beta1=1e-4)  # r / beta1 = 1e4
    assert value.dtype == torch.float64
    torch.testing.assert_close(value[0], torch.tensor(1 - 1e-4 * math.log(2), dtype=torch.float64))
    assert value[1] == -1


@given(n=st.integers(1, 64), share=st.floats(0, 1), beta1=st.floats(1e-4, 100))
def test_iv_the_closed_form_equals_logsumexp(n: int, share: float, beta1: float) -> None:
    k = round(share * n)
    rewards = torch.tensor([1.0] * k + [0.0] * (n - k))
    torch.testing.assert_close(v_star_from_pass_rate(k, n, beta1), v_star(rewards, beta1), rtol=1e-9, atol=1e-12)


def test_v_star_goes_from_the_maximum_to_the_mean_as_beta1_grows() -> None:
    rewards = torch.tensor([0.1, 0.7, 0.2])
    values = [float(v_star(rewards, beta1)) for beta1 in (1e-5, 0.1, 0.5, 2.0, 1e6)]
    assert values == sorted(values, reverse=True)
    assert values[0] == pytest.approx(0.7, abs=1e-4)
    assert values[-1] == pytest.approx(1 / 3, abs=1e-6)


@given(n=st.integers(1, 32), beta1=st.floats(1e-3, 10))
def test_v_star_is_monotone_in_the_pass_count(n: int, beta1: float) -> None:
    values = v_star_from_pass_rate(torch.arange(n + 1), n, beta1)
    assert bool((values.diff() > 0).all())
    assert values[0] == 0
    assert float(values[-1]) == pytest.approx(1)


def test_a_mask_leaves_samples_out() -> None:
    rewards = torch.tensor([[1.0, 0.0, 5.0], [0.0, 2.0, 2.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    expected = torch.stack([v_star(rewards[0, :2], 0.5), v_star(rewards[1], 0.5)])
    torch.testing.assert_close(v_star(rewards, 0.5, mask), expected)


@pytest.mark.parametrize("beta1", [0.0, -1.0, math.inf, math.nan])
def test_an_impossible_beta1_is_refused(beta1: float) -> None:
    with pytest.raises(ValueError, match="beta1"):
        v_star(torch.ones(2), beta1)


def test_a_prompt_without_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="N >= 1"):
        v_star(torch.ones(3, 0), 0.5)
    with pytest.raises(ValueError, match="1 prompts have no sample"):
        v_star(torch.ones(2, 2), 0.5, torch.tensor([[True, True], [False, False]]))
    with pytest.raises(ValueError, match="0 <= k <= n"):
        v_star_from_pass_rate(3, 2, 0.5)
