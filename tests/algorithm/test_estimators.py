"""pass@k and maj@k against all draws counted one by one; the standard error against its definition."""

import itertools
import math
import statistics
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from astar_megatron.algorithm.estimators import majority_at_k, mean_and_error, pass_at_k


@pytest.mark.parametrize("num_samples", range(1, 8))
def test_pass_at_k_is_the_share_of_draws_with_a_right_sample(num_samples: int) -> None:
    for num_right in range(num_samples + 1):
        samples = [i < num_right for i in range(num_samples)]
        for k in range(1, num_samples + 1):
            draws = [any(draw) for draw in itertools.combinations(samples, k)]
            assert pass_at_k(num_samples, num_right, k) == pytest.approx(sum(draws) / len(draws), abs=1e-12)


def test_pass_at_k_stays_exact_for_many_samples() -> None:
    assert pass_at_k(10_000, 1, 100) == pytest.approx(0.01)
    assert pass_at_k(10_000, 9_999, 2) == 1.0
    assert pass_at_k(10_000, 0, 10_000) == 0.0


def _majority(draw: tuple[int | None, ...], rewards: dict[int, float]) -> float:
    votes = Counter(answer for answer in draw if answer is not None)
    if not votes:
        return 0.0
    commonest = [answer for answer, count in votes.items() if count == max(votes.values())]
    return sum(rewards[answer] for answer in commonest) / len(commonest)


@given(counts=st.lists(st.integers(1, 4), max_size=4), without=st.integers(0, 2), data=st.data())
def test_majority_at_k_is_the_mean_over_all_draws(counts: list[int], without: int, data: st.DataObject) -> None:
    total = sum(counts) + without
    if total == 0:
        return
    rewards = dict(enumerate(data.draw(st.lists(st.sampled_from([0.0, 0.1, 1.0]), min_size=4, max_size=4))))
    k = data.draw(st.integers(1, min(total, 8)))
    samples = [answer for answer, count in enumerate(counts) for _ in range(count)] + [None] * without
    draws = [_majority(draw, rewards) for draw in itertools.combinations(samples, k)]
    groups = [(count, rewards[answer]) for answer, count in enumerate(counts)]
    assert majority_at_k(groups, without, k) == pytest.approx(sum(draws) / len(draws), abs=1e-12)


def test_majority_of_all_samples_is_the_commonest_answer_and_ties_share() -> None:
    assert majority_at_k([(17, 1.0), (10, 0.0)], 5, 32) == 1.0
    assert majority_at_k([(2, 1.0), (3, 0.0)], 27, 32) == 0.0  # no answer is no vote
    assert majority_at_k([(4, 1.0), (4, 0.0)], 0, 8) == 0.5
    assert majority_at_k([], 8, 8) == 0.0


@pytest.mark.parametrize(("samples", "right", "k"), [(4, 1, 0), (4, 1, 5), (4, 5, 1), (0, 0, 1)])
def test_impossible_counts_are_refused(samples: int, right: int, k: int) -> None:
    with pytest.raises(ValueError, match="pass@k: expected"):
        pass_at_k(samples, right, k)
    with pytest.raises(ValueError, match="maj@k: expected"):
        majority_at_k([(0, 1.0)], samples, k)


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=30))
def test_the_error_is_the_deviation_over_the_root_of_the_count(values: list[float]) -> None:
    mean, error = mean_and_error(values)
    assert mean == pytest.approx(statistics.fmean(values), abs=1e-12)
    assert error == pytest.approx(statistics.stdev(values) / math.sqrt(len(values)), abs=1e-9)


def test_one_value_has_no_error() -> None:
    mean, error = mean_and_error([0.5])
    assert mean == 0.5 and math.isnan(error)
