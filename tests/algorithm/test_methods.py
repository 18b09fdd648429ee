"""What each method makes of rollouts: its columns, what it learns, what it says of a step, and which one a run has."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import samples
import test_train
import torch

from astar_megatron.algorithm.astar import Astar
from astar_megatron.algorithm.clipped import TokenMean
from astar_megatron.algorithm.grpo import Grpo
from astar_megatron.algorithm.methods import Stage1, objective_of
from astar_megatron.algorithm.metrics import LogprobSums
from astar_megatron.algorithm.oapl import Oapl
from astar_megatron.algorithm.objective import Objective
from astar_megatron.algorithm.rebel import Rebel
from astar_megatron.algorithm.spo import Spo, ValueTracker
from astar_megatron.config import GrpoConfig, OaplConfig, RebelConfig, RunConfig, SpoConfig
from astar_megatron.types import Prompt, Rollout

PROMPTS = [Prompt(uid=name, token_ids=(1, 2), text="", answer="") for name in "abc"]


def rollouts(*rewards: float | None, group: int = 1, lengths: tuple[int, ...] = ()) -> list[Rollout]:
    """A response for each reward, `group` of them to a prompt."""
    lengths = lengths or (2,) * len(rewards)
    return [
        samples.rollout(
            PROMPTS[i // group],
            reward=reward,
            token_ids=(5,) * length,
            token_logprobs=tuple(-0.25 * (i + 1) for _ in range(length)),
        )
        for i, (reward, length) in enumerate(zip(rewards, lengths, strict=True))
    ]


def mean(over: Any = "sequence", mini_batch_size: int = 2) -> TokenMean:
    return TokenMean(over=over, mini_batch_size=mini_batch_size, max_response_tokens=50)


def run(name: str, **sections: Any) -> RunConfig:
    return samples.run_config(objective={"name": name}, **sections)


def health_of(objective: Objective, drawn: list[Rollout]) -> Mapping[str, float]:
    """What the method says of a step in which policy and reference were one."""
    columns, zeros = objective.columns(drawn).sequences, torch.zeros(len(drawn))
    return objective.metrics(drawn, columns, LogprobSums(logprobs=zeros, reference=zeros, on_policy=len(drawn)))


def test_grpo_compares_with_the_others_to_a_prompt() -> None:
    drawn = rollouts(1.0, 0.0, 0.0, 1.0, 1.0, 1.0, group=3)
    plain = Grpo(GrpoConfig(group_size=3, normalise=False), mean())
    columns = plain.columns(drawn)
    assert columns.sequences["advantage"].tolist() == pytest.approx([2 / 3, -1 / 3, -1 / 3, 0, 0, 0])
    scaled = Grpo(GrpoConfig(group_size=3), mean()).columns(drawn).sequences["advantage"]
    assert scaled[:3].tolist() == pytest.approx([1.1547, -0.57735, -0.57735], abs=1e-5) and scaled[3:].tolist() == [
        0,
        0,
        0,
    ]
    assert columns.tokens["engine_logprob"].tolist() == [
        -0.25,
        -0.25,
        -0.5,
        -0.5,
        -0.75,
        -0.75,
        -1.0,
        -1.0,
        *[-1.25] * 2,
        *[-1.5] * 2,
    ]
    health = health_of(plain, drawn)
    assert health["flat_groups"] == 0.5 and health["kl_token"] == 0.0


@pytest.mark.parametrize(
    ("over", "weights"),
    [("sequence", [1 / 3, 1, 1 / 2, 1 / 4]), ("token", [2 / 4, 2 / 4, 2 / 6, 2 / 6]), ("constant", [1 / 50] * 4)],
)
def test_the_mean_over_tokens_is_the_one_asked_for(over: str, weights: list[float]) -> None:
    assert mean(over).weights(rollouts(0, 0, 0, 0, lengths=(3, 1, 2, 4), group=2)).tolist() == pytest.approx(weights)


def test_rebel_knows_the_other_response_of_each_pair() -> None:
    drawn = rollouts(1.0, 0.0, None, 0.0, group=2)
    columns = Rebel(RebelConfig()).columns(drawn).sequences
    assert columns["peer"].tolist() == [1, 0, 3, 2]
    assert columns["reward"].tolist() == [1, 0, 0, 0] and columns["peer_reward"].tolist() == [0, 1, 0, 0]
    assert health_of(Rebel(RebelConfig()), drawn)["flat_groups"] == 0.5


def test_oapl_takes_its_value_from_the_group_or_from_the_table() -> None:
    drawn = rollouts(1.0, 0.0, 0.0, 0.0, group=2)
    value = math.log((math.e + 1) / 2)
    of_group = Oapl(OaplConfig(group_size=2), {}).columns(drawn).sequences
    assert of_group["advantage"].tolist() == pytest.approx([1 - value, -value, 0, 0])
    assert of_group["engine_logprob"].tolist() == [-0.5, -1.0, -1.5, -2.0]
    of_table = Oapl(OaplConfig(value="table", group_size=1), {"a": 0.25, "b": 0.5}).columns(drawn).sequences
    assert of_table["advantage"].tolist() == [0.75, -0.25, -0.5, -0.5]


def test_oapl_renews_its_reference_after_as_many_steps_as_asked_for() -> None:
    engine, copy = Oapl(OaplConfig(), {}), Oapl(OaplConfig(refresh_steps=3), {})
    assert [step for step in range(8) if copy.refreshes_reference(step)] == [3, 6]
    assert not any(engine.refreshes_reference(step) for step in range(8))
    assert copy.loss.against_copy and not engine.loss.against_copy


def test_spo_starts_from_stage_1_and_forgets_the_faster_the_more_the_policy_moves() -> None:
    stage_1 = {"a": 0.25}, {"a": 7}
    tracker = ValueTracker(SpoConfig(), *stage_1)
    assert tracker["a"] == (1.75 + 0.5) / 8 and tracker["b"] == 0.5
    tracker.add("a", 1.0, 0.0)  # not moved: 0.96 of 2.25 and 5.75
    assert tracker["a"] == pytest.approx((0.96 * 2.25 + 1) / (0.96 * 8 + 1))
    a, b = 0.96 * 2.25 + 1, 0.96 * 5.75
    tracker.add("a", 0.0, 0.6)  # ten half-lives: the least decay
    assert tracker["a"] == pytest.approx(0.875 * a / (0.875 * (a + b) + 1))
    tracker.add("b", 1.0, 0.06 / 8)  # an eighth of a half-life: between the two
    decay = 2 ** (-1 / 8)
    assert 0.875 < decay < 0.96 and tracker["b"] == pytest.approx((4 * decay + 1) / (8 * decay + 1))
    again = ValueTracker(SpoConfig(), *stage_1)
    again.restore(tracker.state())
    assert [again[uid] for uid in "abc"] == [tracker[uid] for uid in "abc"]


def test_spo_normalises_over_the_batch_learns_after_the_step_and_prefers_what_is_undecided() -> None:
    stage_1 = {"a": 0.5, "b": 0.0, "c": 1.0}, {"a": 4, "b": 4, "c": 4}  # values of 0.5, 0.1 and 0.9
    objective = Spo(SpoConfig(), mean("token", 3), *stage_1)
    drawn = rollouts(1.0, None, 1.0)
    advantage = objective.columns(drawn).sequences["advantage"]  # of 0.5, -0.1 and 0.1
    assert advantage.tolist() == pytest.approx([1.33631, -1.06904, -0.26726], abs=1e-4)
    assert objective.priorities(["a", "b", "c"]) == pytest.approx([0.55, 0.35, 0.35])
    health = health_of(objective, drawn)
    assert (health["value_mean"], health["value_error"]) == (pytest.approx(0.5), pytest.approx(0.09))
    objective.learn(drawn, health)
    assert objective.priorities(["b"]) == pytest.approx([0.35])  # what could not be scored says nothing
    again = Spo(SpoConfig(), mean("token", 3), *stage_1)
    again.restore(objective.state())
    assert again.priorities(["a"]) == objective.priorities(["a"]) != pytest.approx([0.55])


STAGE_1 = Stage1(v_star={"a": 0.4}, v_star_at_beta2={"a": 0.3}, samples={"a": 4}, success={"a": 0.2})


@pytest.mark.parametrize("name", ["astar", "oapl", "grpo", "rebel", "ppo", "spo"])
def test_each_name_has_its_method(name: str) -> None:
    objective = objective_of(run(name, train={"batch_size": 8}), STAGE_1)
    assert type(objective).__name__.lower() == name
    drawn = rollouts(*[1.0] * 8, group=8)
    health = health_of(objective, drawn)
    assert health.keys() <= test_train.KEYS | test_train.KEYS_OF_OTHER_METHODS  # which the guide explains
    restored = objective_of(run(name), STAGE_1)
    restored.restore(objective.state())


def test_old_weights_that_drew_are_known_by_the_engines_log_probs() -> None:
    for name, others in (("grpo", set()), ("ppo", {"values"})):
        assert objective_of(run(name), STAGE_1).loss.needs == {"old"} | others
        assert objective_of(run(name, rollout={"max_staleness": 1}), STAGE_1).loss.needs == others


def test_astar_says_what_weighed_responses_are_worth() -> None:
    drawn = rollouts(1.0, 0.0)[:1]
    plain = health_of(objective_of(run("astar"), STAGE_1), drawn)
    weighed = health_of(objective_of(run("astar", rollout={"max_staleness": 2}), STAGE_1), drawn)
    assert weighed.keys() - plain.keys() == {"weight_mean", "effective_share"} <= test_train.KEYS_OF_OTHER_METHODS


def test_astar_counts_the_prompts_whose_value_is_above_that_at_beta2() -> None:
    drawn = rollouts(1.0, 0.0)[:1]
    above = health_of(objective_of(run("astar"), STAGE_1), drawn)
    assert above["unstable_share"] == 1.0
    below = Stage1(v_star={"a": 0.3}, v_star_at_beta2={"a": 0.3}, samples={"a": 4})
    assert health_of(objective_of(run("astar"), below), drawn)["unstable_share"] == 0.0


@pytest.mark.parametrize(
    ("sections", "cap"),
    [
        ({}, None),
        ({"rollout": {"max_staleness": 3}}, 2.0),
        ({"rollout": {"max_staleness": 3}, "astar": {"importance_cap": 5.0}}, 5.0),
        ({"astar": {"importance_cap": 5.0}}, 5.0),
    ],
)
def test_astar_weighs_what_older_weights_drew(sections: dict[str, Any], cap: float | None) -> None:
    cfg = run("astar", **sections)
    objective = objective_of(cfg, STAGE_1)
    assert isinstance(objective, Astar) and objective.loss.importance_cap == cap


@pytest.mark.parametrize(
    ("name", "sections"),
    [
        ("astar", {"oapl": {"group_size": 1}, "spo": {"least_decay": 0.97}}),
        ("oapl", {"oapl": {"refresh_steps": 5}}),
        ("oapl", {"oapl": {"group_size": 1, "value": "table"}}),
        ("grpo", {"rollout": {"max_staleness": 3}}),
    ],
)
def test_what_has_no_part_in_a_run_is_not_refused(name: str, sections: dict[str, Any]) -> None:
    run(name, **sections)


def test_a_negative_reward_counts_as_nothing_for_spo_in_the_advantage_too() -> None:
    objective = Spo(SpoConfig(), mean("token", 3), {}, {})  # values of 0.5
    drawn = rollouts(-1.0, 0.0, 1.0)
    advantage = objective.columns(drawn).sequences["advantage"]
    assert advantage[0] == advantage[1] < 0 < advantage[2]
    assert health_of(objective, drawn)["value_error"] == pytest.approx(0.25)
