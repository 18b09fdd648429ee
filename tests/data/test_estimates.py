"""The errors and intervals that come with V*, from a table."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from samples import CONTRACT
from table_rows import PROMPTS, scored

from astar_megatron.algorithm import value
from astar_megatron.data.estimates import estimate
from astar_megatron.data.v_star import TableError, VStarTable


@pytest.fixture
def table(tmp_path: Path) -> VStarTable:
    return VStarTable.create_or_open(tmp_path, CONTRACT)


def test_binary_rewards_have_the_exact_interval_through_v_star(table: VStarTable) -> None:
    passes = [(0, 8), (8, 8), (3, 8), (1, 5), (2, 3), (20, 32)]
    for prompt, (k, n) in zip(PROMPTS, passes, strict=True):
        table.append([scored(prompt, i, float(i < k)) for i in range(n)])
    for level in (0.5, 0.95):
        estimates = table.estimate(0.7, PROMPTS, level=level)
        for place, (k, n) in enumerate(passes):
            ends = value.pass_rate_interval(torch.tensor(k), torch.tensor(n), level)
            low, high = (float(value.v_star_from_pass_rate(end, 1.0, 0.7)) for end in ends)
            assert (estimates.low[place], estimates.high[place]) == (
                pytest.approx(low, abs=1e-6),
                pytest.approx(high, abs=1e-6),
            )
            rewards = torch.tensor([1.0] * k + [0.0] * (n - k))
            assert estimates.error[place] == pytest.approx(float(value.standard_error(rewards, 0.7)))
        assert (estimates.low <= estimates.v_star + 1e-12).all() and (estimates.v_star <= estimates.high + 1e-12).all()
    assert estimates.low[0] == 0 and estimates.high[1] == pytest.approx(1)
    assert estimates.samples.tolist() == [n for _, n in passes]


def coverage(values: Sequence[float], shares: Sequence[float], beta1: float, n: int) -> float:
    """How many of 1000 intervals, each of `n` rewards drawn from a distribution, hold its V*."""
    rewards = np.array(values)
    true = float(value.v_star(torch.from_numpy(rewards), beta1, torch.tensor(shares)))
    drawn = np.random.default_rng(0).choice(rewards, p=shares, size=(1000, n))
    starts, counts = np.arange(1000) * n, np.full(1000, n)
    estimates = estimate([""] * 1000, drawn.ravel(), np.ones(drawn.size), starts, counts, beta1, level=0.95)
    return float(((estimates.low <= true) & (true <= estimates.high)).mean())


@pytest.mark.parametrize(
    ("values", "shares", "beta1", "counts"),
    [
        *(
            ((0.0, 0.1, 1.0), shares, beta1, (2, 8, 32))
            for shares in ((0.5, 0.45, 0.05), (0.05, 0.9, 0.05), (0.2, 0.7, 0.1), (0.9, 0.09, 0.01))
            for beta1 in (0.05, 0.5, 5.0)
        ),
        *(((-1.0, 1.0), (0.15, 0.85), beta1, (1, 4, 8)) for beta1 in (0.5, 5.0)),
        *(((-1.0, 0.0, 1.0), (0.15, 0.4, 0.45), beta1, (1, 4, 8)) for beta1 in (0.5, 5.0)),
    ],
)
def test_intervals_of_other_rewards_cover(
    values: tuple[float, ...], shares: tuple[float, ...], beta1: float, counts: tuple[int, ...]
) -> None:
    for n in counts:
        assert coverage(values, shares, beta1, n) >= 0.95, n


def test_other_rewards_have_the_interval_of_their_distribution(table: VStarTable) -> None:
    for prompt, rewards in zip(PROMPTS, ([0.1, 1.0, 0.0, 0.1], [0.0, 0.1] * 4, [0.0] * 8), strict=False):
        table.append([scored(prompt, i, r) for i, r in enumerate(rewards)])
    estimates = table.estimate(0.5, level=0.95)
    share = (np.log(40) / 8) ** 0.5  # of 4: two and 0.716 of the third
    ends = [
        0.5 * np.log(w @ np.exp(np.array(r) / 0.5))
        for w, r in (((0.25, 0.75 - share, share), (0, 0.1, -1)), ((0.25, 0.75 - share, share), (1, 0.1, 1)))
    ]
    assert (estimates.low[0], estimates.high[0]) == (pytest.approx(ends[0]), pytest.approx(ends[1]))
    # 4 of 0 and 4 of 0.1 say less than 8 of 0
    assert estimates.low[1] <= estimates.low[2] and estimates.high[1] >= estimates.high[2]
    assert (estimates.least[0], estimates.most[0], estimates.mean[0]) == (0.0, 1.0, pytest.approx(0.3))


def test_an_interval_is_of_its_prompts_own_samples_alone(table: VStarTable) -> None:
    for prompt, k in ((PROMPTS[0], 0), (PROMPTS[1], 3)):
        table.append([scored(prompt, i, float(i < k)) for i in range(8)])
    before = table.estimate(0.5)
    table.append([scored(PROMPTS[2], i, 0.1 * i) for i in range(8)])
    table.append([scored(PROMPTS[1], 8, 0.1)])  # beyond those that count
    after = table.estimate(0.5, PROMPTS[:3], 8)
    assert after.low[:2].tolist() == before.low.tolist() and after.high[:2].tolist() == before.high.tolist()


def test_equal_rewards_leave_room_for_others(table: VStarTable) -> None:
    for prompt, n in zip(PROMPTS, (1, 2, 8, 64), strict=False):
        table.append([scored(prompt, i, 0.1) for i in range(n)])
    table.append([scored(PROMPTS[4], i, -1.0) for i in range(8)])
    estimates = table.estimate(0.5, level=0.95)
    assert np.isnan(estimates.error[0]) and (estimates.error[1:] == 0).all()
    assert (
        (estimates.low[:4] < 0.1).all()
        and (estimates.high[:4] > 0.1).all()
        and (np.diff(estimates.width[:4]) < 0).all()
    )
    rate = 1 - 0.025 ** (1 / 8)  # none of 8 had another reward
    assert estimates.low[2] == pytest.approx(0.5 * np.log((1 - rate) * np.exp(0.2) + rate * np.exp(-2)))
    assert estimates.high[2] == pytest.approx(0.5 * np.log((1 - rate) * np.exp(0.2) + rate * np.exp(2)))
    assert estimates.low[4] == -1 and estimates.high[4] > 0


def test_each_prompt_may_have_a_number_of_samples_of_its_own(table: VStarTable) -> None:
    for prompt in PROMPTS[:3]:
        table.append([scored(prompt, i, float(i % 2), tokens=i + 1) for i in range(6)])
    wanted = np.array([1, 4, 6])
    estimates = table.estimate(0.5, PROMPTS[:3], wanted)
    assert estimates.samples.tolist() == [1, 4, 6] and estimates.tokens.tolist() == [1, 10, 21]
    assert estimates.mean.tolist() == [0.0, 0.5, 0.5]
    with pytest.raises(ValueError, match="1 of 3 prompts have less than 9 samples"):
        table.estimate(0.5, PROMPTS[:3], np.array([1, 9, 6]))
    with pytest.raises(TableError, match="at least 1, got 0"):
        table.estimate(0.5, PROMPTS[:3], np.array([1, 0, 6]))
    assert table.lacking(PROMPTS[:4], np.array([1, 9, 6, 2])).tolist() == [0, 3, 0, 2]
    assert table.missing(PROMPTS[:4], np.array([1, 8, 6, 1])) == [(PROMPTS[1], 6), (PROMPTS[1], 7), (PROMPTS[3], 0)]


def test_a_sample_beyond_those_that_count_does_not_stand_in_for_a_missing_one(table: VStarTable) -> None:
    table.append([scored(PROMPTS[0], i, float(i >= 8)) for i in range(16) if i != 3])
    assert table.lacking(PROMPTS[:1], 8).tolist() == [1]
    with pytest.raises(ValueError, match="1 of 1 prompts have less than 8 samples"):
        table.estimate(0.5, PROMPTS[:1], 8)
    assert table.estimate(0.5, PROMPTS[:1], 3).mean[0] == 0 and table.estimate(0.5).samples[0] == 15


@pytest.mark.parametrize("level", [-1.0, 0.0, 1.0, 1.5, np.nan])
def test_a_level_that_is_none_is_refused(level: float, table: VStarTable) -> None:
    table.append([scored(PROMPTS[0], 0, 0.3)])
    with pytest.raises(ValueError, match="level between 0 and 1"):
        table.estimate(0.5, level=level)
