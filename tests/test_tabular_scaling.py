"""Asymptotes of `astar scale fit` beside known ones: of curves that are no sigmoids, and of tabular policies."""

import math

import numpy as np
import pytest
import torch
from benchmarks.tabular_scaling import BETAS2, coverage, measured, trained

from astar_megatron.studies.extrapolation import Extrapolation, extrapolate, sigmoid_numbers
from astar_megatron.studies.laws import CONSTANT, Points, fit


def fast_and_slow_part(seed: int) -> Points:
    compute, runs, random = np.linspace(1 / 24, 1.0, 24), 3, np.random.default_rng(seed)
    score = 0.8 - 0.45 * np.exp(-compute / 0.05) - 0.15 * np.exp(-compute / 0.4)
    score = score + 0.004 * random.standard_normal((runs, 24))
    return Points(np.tile(compute, runs), score.ravel(), np.repeat(np.arange(runs), 24))


def of_all_points_alone(result: Extrapolation) -> tuple[float, float]:
    whole = result.laws[0].whole
    assert whole is not None
    span = float(np.ptp(result.points.score))
    return sigmoid_numbers(whole, fit(CONSTANT, result.points), span)["asymptote"].interval or (math.nan, math.nan)


def test_an_asymptote_that_parts_of_the_curve_contradict_is_refused_or_its_interval_is_wider() -> None:
    results = [extrapolate("x", fast_and_slow_part(seed), 0.02) for seed in range(6)]
    numbers = [result.laws[0].numbers["asymptote"] for result in results]
    refusals = [number.refusal for number in numbers if number.refusal]
    given = [number.interval for number in numbers if number.interval]
    assert given and all(low <= 0.8 <= high for low, high in given)
    assert refusals and all(refusal.startswith("of the points") for refusal in refusals)
    assert not any(low <= 0.8 <= high for low, high in map(of_all_points_alone, results))


def test_a_saturating_exponential_that_the_sigmoid_misses_has_no_asymptote() -> None:
    compute, random = np.linspace(1 / 40, 1.0, 40), np.random.default_rng(1)
    truth = 0.8 - 0.7 * np.exp(-compute / 0.2)
    score = truth + 0.003 * random.standard_normal((3, 40))
    points = Points(np.tile(compute, 3), score.ravel(), np.repeat(np.arange(3), 40))
    result = extrapolate("x", points, 0.02)
    asymptote = result.laws[0].numbers["asymptote"]
    assert result.verdict == "does not" and asymptote.interval is None
    assert asymptote.refusal is not None and "misses the later means" in asymptote.refusal
    assert of_all_points_alone(result)[0] > 0.8
    assert extrapolate("x", points, 0.5).laws[0].numbers["asymptote"].interval is not None


def test_tabular_policies_trained_with_a_wrong_v_star_stay_at_the_asymptote_and_long_studies_come_to_it() -> None:
    studies = trained(BETAS2[2], torch.arange(2, 48, 3))  # V* at beta1 = 0.5, of 8 samples
    assert float(studies.noise_floor.abs().max()) < 2e-3
    expected = (studies.policies * studies.rewards[:, None, None]).sum(-1).mean((-1, -2))  # [S, scores]
    gap = studies.asymptote - expected[:, -1]
    assert float((studies.asymptote - expected[:, 0]).min()) > 0.1
    assert float(gap[0]) < 0.02 < float(gap[-1])  # the longest and the shortest


@pytest.mark.slow
def test_intervals_of_200_studies_of_tabular_policies_hold_the_true_asymptote_in_90_to_99_of_100() -> None:
    rows = measured(400, 200)["512 responses"]
    own, before = coverage(rows), coverage(rows, "interval_of_all_points")
    assert own["given"] >= 30 and 0.9 <= own["share"] <= 0.99, own
    assert before["share"] < 0.8, before
