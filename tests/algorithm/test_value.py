"""V*: property (iv) of the design, limits, masks and bad input."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from astar_megatron.algorithm.value import (
    pass_rate_interval,
    standard_error,
    v_star,
    v_star_from_pass_rate,
)


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


TINY_TO_HUGE = [5e-324, 1e-310, 1e-300, 1e-30, 1 / 701, 1 / 699, 1.0, 1e8, 1e14, 1e15, 1e16, 1e18, 1e300]


@pytest.mark.parametrize("beta1", TINY_TO_HUGE)
@pytest.mark.parametrize("rewards", [[0.0, 1.0, 1.0, 0.0], [0.1, 0.7, 0.2], [-1.0, 0.5], [0.3, 0.3], [0.0], [1.0, 1.0]])
def test_every_beta1_lies_between_its_limits_and_reaches_them(rewards: list[float], beta1: float) -> None:
    values = torch.tensor(rewards, dtype=torch.float64)
    v, mean, most = float(v_star(values, beta1)), sum(rewards) / len(rewards), max(rewards)
    assert mean - 1e-15 <= v <= most
    if beta1 > 1e15:
        assert v == pytest.approx(mean, abs=1e-15)
    if beta1 < 1e-20:
        assert v == most
    if set(rewards) <= {0.0, 1.0}:
        assert float(v_star_from_pass_rate(sum(rewards), len(rewards), beta1)) == pytest.approx(v, abs=1e-15)
    if len(rewards) > 1:
        error = float(standard_error(values, beta1))
        assert math.isfinite(error)
        if beta1 > 1e15:
            assert error == pytest.approx(float(values.std()) / math.sqrt(len(rewards)), rel=1e-12)


@pytest.mark.parametrize("beta1", TINY_TO_HUGE)
def test_v_star_of_no_and_of_every_pass_is_exact_at_every_beta1(beta1: float) -> None:
    assert float(v_star_from_pass_rate(0, 5, beta1)) == 0
    assert float(v_star_from_pass_rate(5, 5, beta1)) == pytest.approx(1, abs=1e-15)


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
    twice = v_star(rewards[0, [0, 0, 1]], 0.5)
    torch.testing.assert_close(v_star(rewards[0], 0.5, torch.tensor([0.5, 0.25, 0])), twice)
    with pytest.raises(ValueError, match=r"expected weights \[..., N\] >= 0"):
        v_star(rewards, 0.5, mask[:, :2])


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


def _tail(k: int, n: int, p: float) -> float:
    return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))


@given(n=st.integers(1, 40), share=st.floats(0, 1), level=st.sampled_from([0.5, 0.9, 0.95, 0.999]))
def test_the_ends_of_the_interval_have_tails_of_half_the_rest(n: int, share: float, level: float) -> None:
    k = round(share * n)
    low, high = (float(end) for end in pass_rate_interval(torch.tensor(k), torch.tensor(n), level))
    assert (low == 0) if k == 0 else _tail(k, n, low) == pytest.approx((1 - level) / 2, rel=1e-9)
    assert (high == 1) if k == n else 1 - _tail(k + 1, n, high) == pytest.approx((1 - level) / 2, rel=1e-6)
    assert low <= k / n <= high


def test_the_interval_covers_the_true_rate_at_least_as_often_as_it_says() -> None:
    n = 8
    k = torch.arange(n + 1)
    low, high = pass_rate_interval(k, torch.full_like(k, n), 0.9)
    for rate in (0.001, 0.05, 0.2, 0.37, 0.5, 0.81, 0.999):
        covered = (low <= rate) & (rate <= high)
        mass = torch.tensor([math.comb(n, i) * rate**i * (1 - rate) ** (n - i) for i in range(n + 1)])
        assert float(mass[covered].sum()) >= 0.9


def test_pairs_of_different_n_do_not_change_each_other() -> None:
    k, n = torch.tensor([0, 3, 8, 8, 31]), torch.tensor([1, 5, 8, 20, 32])
    together = torch.stack(pass_rate_interval(k, n, 0.95))
    alone = torch.tensor([[float(end) for end in pass_rate_interval(a, b, 0.95)] for a, b in zip(k, n, strict=True)]).T
    torch.testing.assert_close(together, alone.double(), rtol=1e-6, atol=1e-7)


def test_more_samples_of_one_pass_rate_narrow_the_interval() -> None:
    n = torch.tensor([4, 8, 16, 32, 64])
    low, high = pass_rate_interval(n // 4, n, 0.95)
    assert bool(((high - low).diff() < 0).all())


@given(
    rewards=st.lists(st.floats(-2, 2), min_size=2, max_size=12), beta1=st.floats(1e-3, 10), shift=st.floats(-500, 500)
)
def test_the_standard_error_neither_overflows_nor_sees_a_shift(
    rewards: list[float], beta1: float, shift: float
) -> None:
    values = torch.tensor(rewards, dtype=torch.float64)
    error = standard_error(values, beta1)
    assert math.isfinite(error) and error >= 0
    torch.testing.assert_close(standard_error(values + shift, beta1), error, rtol=1e-4, atol=1e-6)
    assert float(v_star(values + shift, beta1)) == pytest.approx(float(v_star(values, beta1)) + shift, abs=1e-6)


def test_standard_error_is_that_of_many_draws_and_v_star_lies_too_low_by_less() -> None:
    generator = torch.Generator().manual_seed(0)
    beta1, n, rate = 0.5, 32, 0.4
    rewards = (torch.rand(40_000, n, generator=generator) < rate).double()
    values, true = v_star(rewards, beta1), float(v_star_from_pass_rate(rate, 1, beta1))
    assert float(standard_error(rewards, beta1).square().mean().sqrt()) == pytest.approx(float(values.std()), rel=0.05)
    bias = float(values.mean()) - true
    assert bias < -4 * float(values.std()) / 200  # plain V* lies too low, by more than the noise of this test
    assert -bias < float(values.std()) / 4


def test_one_sample_has_no_standard_error() -> None:
    assert math.isnan(standard_error(torch.ones(3, 1), 0.5)[0])


@given(
    rewards=st.lists(st.floats(-3, 3), min_size=1, max_size=9),
    beta1=st.floats(1e-4, 1e4),
    place=st.integers(0, 8),
    more=st.floats(0, 2),
)
def test_v_star_lies_between_mean_and_maximum_and_grows_with_each_reward(
    rewards: list[float], beta1: float, place: int, more: float
) -> None:
    values = torch.tensor(rewards, dtype=torch.float64)
    v = float(v_star(values, beta1))
    assert float(values.mean()) - 1e-9 * beta1 - 1e-9 <= v <= max(rewards) + 1e-9
    values[place % len(rewards)] += more
    assert float(v_star(values, beta1)) >= v - 1e-9 * beta1 - 1e-9


@pytest.mark.parametrize("level", [0.0, 1.0, -0.5])
def test_an_impossible_level_or_count_is_refused(level: float) -> None:
    with pytest.raises(ValueError, match="level between 0 and 1"):
        pass_rate_interval(torch.tensor(1), torch.tensor(2), level)
    with pytest.raises(ValueError, match="0 <= k <= n"):
        pass_rate_interval(torch.tensor(3), torch.tensor(2), 0.95)
