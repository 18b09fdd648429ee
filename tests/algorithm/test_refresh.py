"""V* refreshed by on-policy rewards: decayed Beta counts, nothing without a decay, exact over a checkpoint."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from astar_megatron.algorithm.refresh import LiveVStar
from astar_megatron.algorithm.value import v_star, v_star_from_pass_rate


@given(
    k=st.integers(0, 8),
    rewards=st.lists(st.sampled_from([0.0, 1.0]), max_size=30),
    decay=st.floats(0.05, 1),
    beta1=st.floats(0.01, 5),
)
def test_binary_rewards_are_decayed_counts_of_passes_and_failures(
    k: int, rewards: list[float], decay: float, beta1: float
) -> None:
    live = LiveVStar({"u": float(v_star_from_pass_rate(k, 8, beta1))}, {"u": 8}, beta1, decay)
    passes, fails = float(k), 8.0 - k
    for reward in rewards:
        live.add([("u", reward)])
        passes, fails = decay * passes + reward, decay * fails + 1 - reward
    expected = float(v_star_from_pass_rate(passes, passes + fails, beta1))
    assert live["u"] == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(
    first=st.lists(st.floats(-3, 3), min_size=1, max_size=9),
    later=st.lists(st.floats(-3, 3), max_size=9),
    beta1=st.floats(1e-3, 10),
)
def test_without_forgetting_it_is_v_star_of_all_rewards_together(
    first: list[float], later: list[float], beta1: float
) -> None:
    live = LiveVStar(
        {"u": float(v_star(torch.tensor(first, dtype=torch.float64), beta1))}, {"u": len(first)}, beta1, 1.0
    )
    live.add([("u", reward) for reward in later])
    assert live["u"] == pytest.approx(float(v_star(torch.tensor(first + later, dtype=torch.float64), beta1)), abs=1e-9)


def test_without_a_decay_nothing_changes() -> None:
    live = LiveVStar({"u": 0.25}, {"u": 8}, 0.5, None)
    live.add([("u", 1.0)])
    assert (live["u"], live.shift(["u", "u"]), live.state()) == (0.25, 0.0, {})


def test_only_the_prompts_drawn_move_and_the_metric_is_their_mean_shift() -> None:
    live = LiveVStar({"a": 0.25, "b": 0.5}, {"a": 8, "b": 8}, 0.5, 0.9)
    live.add([("a", 1.0)])
    assert live["a"] > 0.25 and live["b"] == 0.5
    assert live.shift(["a", "b"]) == pytest.approx((live["a"] - 0.25) / 2)


def test_it_goes_on_exactly_from_its_state() -> None:
    first, second = (LiveVStar({"a": 0.1, "b": 0.7}, {"a": 4, "b": 8}, 0.5, 0.8) for _ in range(2))
    first.add([("a", 1.0), ("b", 0.0)])
    second.restore(json.loads(json.dumps(first.state())))
    for live in (first, second):
        live.add([("a", 0.0), ("b", 1.0)])
    assert (first["a"], first["b"]) == (second["a"], second["b"])


def test_it_is_finite_where_the_exponential_overflows() -> None:
    live = LiveVStar({"u": 0.0}, {"u": 8}, 1e-4, 0.9)
    for reward in (1.0, 0.0, -1.0):
        live.add([("u", reward)])
    assert math.isfinite(live["u"]) and 0.99 < live["u"] <= 1


def refreshed(beta1: float, decay: float | None) -> LiveVStar:
    live = LiveVStar({"u": 0.25}, {"u": 8}, beta1, decay)
    live.add([("u", 1.0)])
    return live


@pytest.mark.parametrize(("beta1", "decay", "key"), [(5.0, 0.9, "beta1 0.5"), (0.5, 0.8, "refresh_decay 0.9")])
def test_a_state_of_another_beta1_or_decay_is_refused(beta1: float, decay: float, key: str) -> None:
    state = json.loads(json.dumps(refreshed(0.5, 0.9).state()))
    with pytest.raises(ValueError, match=f"refreshed with astar.{key}, this run has .*; set it as it was"):
        refreshed(beta1, decay).restore(state)


def test_a_state_that_began_from_other_samples_of_stage_1_is_refused() -> None:
    state = json.loads(json.dumps(refreshed(0.5, 0.9).state()))
    for first, samples in ((0.26, 8), (0.25, 4)):
        with pytest.raises(ValueError, match=r"other samples of stage 1 .*sweep\.num_samples"):
            LiveVStar({"u": first}, {"u": samples}, 0.5, 0.9).restore(state)


def test_with_the_refresh_turned_off_a_resume_has_stage_1_s() -> None:
    live = refreshed(0.5, None)
    live.restore(refreshed(0.5, 0.9).state())
    assert (live["u"], live.state()) == (0.25, {})


@pytest.mark.parametrize("beta1", [1e8, 1e12, 1e15, 1e17, 1e100])
def test_at_a_large_beta1_it_is_the_mean_of_the_rewards(beta1: float) -> None:
    live = LiveVStar({"u": 0.5}, {"u": 8}, beta1, 0.9)
    live.add([("u", 1.0)])
    assert live["u"] == pytest.approx((0.9 * 8 * 0.5 + 1) / (0.9 * 8 + 1), rel=1e-8)


def test_a_tiny_decay_leaves_a_number() -> None:
    live = LiveVStar({"u": 1.0}, {"u": 8}, 0.01, 1e-20)
    live.add([("u", 0.0)])
    assert live["u"] == pytest.approx(1 + 0.01 * math.log(8e-20))
