"""pass@k against all draws counted one by one, maj@n and the standard error against their definitions."""

import itertools
import math
import statistics
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from astar_megatron.algorithm.estimators import majority, mean_and_error, pass_at_k


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


@given(answers=st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=9), data=st.data())
def test_the_majority_is_the_mean_over_all_answers_that_no_other_beats(answers: list[str], data: st.DataObject) -> None:
    values = data.draw(st.lists(st.sampled_from([0.0, 0.1, 1.0]), min_size=4, max_size=4))
    rewards = dict(zip("abcd", values, strict=True))
    counts = Counter(answers)
    unbeaten = [answer for answer in counts if all(counts[answer] >= count for count in counts.values())]
    expected = statistics.fmean(rewards[answer] for answer in unbeaten) if unbeaten else 0.0
    groups = [(count, rewards[answer]) for answer, count in counts.items()]
    assert majority(groups) == pytest.approx(expected, abs=1e-12)


def test_equally_common_answers_share_however_many_they_are() -> None:
    assert majority([(17, 1.0), (10, 0.0)]) == 1.0
    assert majority([(4, 1.0), (4, 0.0)]) == 0.5
    assert majority([(1, 1.0), *[(1, 0.0)] * 100_000]) == pytest.approx(1 / 100_001)
    assert majority([]) == 0.0


@pytest.mark.parametrize(("samples", "right", "k"), [(4, 1, 0), (4, 1, 5), (4, 5, 1), (0, 0, 1)])
def test_impossible_counts_are_refused(samples: int, right: int, k: int) -> None:
    with pytest.raises(ValueError, match="pass@k: expected"):
        pass_at_k(samples, right, k)


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=30))
def test_the_error_is_the_deviation_over_the_root_of_the_count(values: list[float]) -> None:
    mean, error = mean_and_error(values)
    assert mean == pytest.approx(statistics.fmean(values), abs=1e-12)
    assert error == pytest.approx(statistics.stdev(values) / math.sqrt(len(values)), abs=1e-9)


def test_one_value_has_no_error() -> None:
    mean, error = mean_and_error([0.5])
    assert mean == 0.5 and math.isnan(error)
