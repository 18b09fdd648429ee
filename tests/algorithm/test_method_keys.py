"""From the configuration to the losses: every key of every method, at odd values, in its formula in plain Python."""

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import samples
import torch

from astar_megatron.algorithm.methods import Stage1, objective_of
from astar_megatron.algorithm.objective import Objective, ResponseTokens
from astar_megatron.types import Prompt, Rollout

PROMPTS = [Prompt(uid=name, token_ids=(1, 2), text="", answer="") for name in "abcdef"]
STAGE_1 = Stage1(
    v_star={prompt.uid: 0.1 * i for i, prompt in enumerate(PROMPTS)},
    samples={prompt.uid: 4 for prompt in PROMPTS},
    success={prompt.uid: 0.2 * i for i, prompt in enumerate(PROMPTS)},
)
MOST_TOKENS, BATCH = 17, 6


@dataclass(frozen=True)
class Response:
    """Its tokens' log-probs under the policy, that before the step, the reference and the engine; its score."""

    uid: str
    score: float
    now: Sequence[float]
    before: Sequence[float]
    reference: Sequence[float]
    engine: Sequence[float]


@dataclass(frozen=True)
class Case:
    objective: Objective
    drawn: Sequence[Rollout]
    tokens: ResponseTokens
    responses: Sequence[Response]

    def losses(self, **more: Any) -> list[float]:
        """What the objective makes of them."""
        columns = self.objective.columns(self.drawn)
        return self.objective.loss(self.tokens, {**columns.sequences, **columns.tokens, **more}).tolist()


def case(name: str, seed: int, group: int = 1, num_steps: int = 9, **sections: Any) -> Case:
    """A batch of BATCH responses, `group` of them to a prompt, for a run with these sections."""
    train = {"batch_size": BATCH, "mini_batch_size": BATCH // 2 if name == "grpo" else BATCH, "num_steps": num_steps}
    sections = {"train": train, "sampling": {"max_response_tokens": MOST_TOKENS}} | sections
    chance = random.Random(seed)
    objective = objective_of(samples.run_config(objective={"name": name}, **sections), STAGE_1)
    drawn, responses = [], []
    for number in range(BATCH):
        engine, now, reference, before = ([], [], [], [])
        for _ in range(chance.randint(1, 6)):
            engine.append(chance.uniform(-3.0, 0.0))
            now.append(engine[-1] + chance.gauss(0.0, 0.2))
            reference.append(now[-1] + chance.gauss(0.0, 0.5))
            before.append(now[-1] + chance.gauss(0.0, 0.3))
        rollout = samples.rollout(
            PROMPTS[number // group],
            reward=chance.choice([0.0, 1.0, -1.0, 0.1, None]),
            token_ids=(5,) * len(now),
            token_logprobs=tuple(engine),
        )
        drawn.append(rollout)
        responses.append(Response(rollout.prompt.uid, rollout.score, now, before, reference, engine))
    lengths = tuple(len(response.now) for response in responses)

    def column(values: Sequence[Sequence[float]]) -> torch.Tensor:
        return torch.tensor(list(itertools.chain.from_iterable(values)), dtype=torch.float64)

    tokens = ResponseTokens(
        logprobs=column([response.now for response in responses]).requires_grad_(),
        reference_logprobs=column([response.reference for response in responses]),
        lengths=lengths,
        sum_tokens=lambda values: torch.stack([own.sum() for own in values.split(lengths)]),
        before=column([response.before for response in responses]),
    )
    return Case(objective, drawn, tokens, responses)


def surrogate(
    response: Response, advantages: Sequence[float], old: Sequence[float], low: float, high: float, kl_coef: float
) -> float:
    """PPO's clipped surrogate and the k3 estimate of the KL divergence, summed over the tokens."""
    total = 0.0
    for now, before, reference, advantage in zip(response.now, old, response.reference, advantages, strict=True):
        ratio = math.exp(now - before)
        total -= min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
        total += kl_coef * (math.exp(reference - now) - (reference - now) - 1)
    return total


def equal(got: Sequence[float], expected: Sequence[float]) -> bool:
    """Columns are float32."""
    return got == pytest.approx(expected, abs=2e-6, rel=2e-6)


def deviation(values: Sequence[float], less: int) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - less))


SEEDS = pytest.mark.parametrize("seed", [0, 1, 2])
STALE = pytest.mark.parametrize("staleness", [0, 2])


@SEEDS
@STALE
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("over", ["token", "sequence", "constant"])
def test_grpo(seed: int, staleness: int, normalise: bool, over: str) -> None:
    keys = {"group_size": 3, "normalise": normalise, "loss": over, "clip_low": 0.07, "clip_high": 0.31, "kl_coef": 0.05}
    made = case("grpo", seed, group=3, grpo=keys, rollout={"max_staleness": staleness})
    expected = []
    for place, response in enumerate(made.responses):
        mini = made.responses[place // 3 * 3 :][:3]  # a group here, and the mini-batch
        scores = [each.score for each in mini]
        advantage = response.score - sum(scores) / 3
        if normalise:
            advantage /= deviation(scores, less=1) + 1e-6
        count = {"token": sum(len(each.now) for each in mini) / 3, "sequence": len(response.now)}.get(over, MOST_TOKENS)
        old = response.engine if staleness else response.before
        expected.append(surrogate(response, [advantage] * len(old), old, 0.07, 0.31, 0.05) / count)
    assert equal(made.losses(), expected)


@SEEDS
@pytest.mark.parametrize("value", ["group", "table"])
@pytest.mark.parametrize("refresh_steps", [None, 1])
@pytest.mark.parametrize(("scale", "factor"), [("paper", 1.0), ("pg", 1 / 0.04)])
def test_oapl(seed: int, value: str, refresh_steps: int | None, scale: str, factor: float) -> None:
    keys = {"group_size": 3, "beta1": 0.4, "beta2": 0.02, "value": value, "refresh_steps": refresh_steps}
    made = case("oapl", seed, group=3, oapl=keys, optim={"loss_scale": scale})
    assert made.objective.loss.gradient_scale == pytest.approx(factor)
    expected = []
    for place, response in enumerate(made.responses):
        scores = [each.score for each in made.responses[place // 3 * 3 :][:3]]
        of_group = 0.4 * math.log(sum(math.exp(score / 0.4) for score in scores) / 3)
        old = sum(response.reference if refresh_steps else response.engine)
        target = response.score - (of_group if value == "group" else STAGE_1.v_star[response.uid])
        expected.append((0.02 * (sum(response.now) - old) - target) ** 2)
    assert equal(made.losses(), expected)


@SEEDS
def test_rebel(seed: int) -> None:
    made = case("rebel", seed, group=2, rebel={"eta": 3.3})
    shifts = torch.tensor([sum(response.now) - sum(response.before) for response in made.responses]).double()
    peer = made.objective.columns(made.drawn).sequences["peer"]
    expected = []
    for place, response in enumerate(made.responses):
        other = made.responses[place ^ 1]
        shift = float(shifts[place] - shifts[place ^ 1])
        expected.append((shift / 3.3 - (response.score - other.score)) ** 2)
    assert equal(made.losses(peer_shift=shifts[peer]), expected)


@SEEDS
@STALE
def test_ppo(seed: int, staleness: int) -> None:
    clips = {"clip_low": 0.1, "clip_high": 0.3, "kl_coef": 0.02, "loss": "sequence"}
    keys = clips | {"gamma": 0.9, "gae_lambda": 0.7, "value_clip": 0.15}
    made = case("ppo", seed, ppo=keys, rollout={"max_staleness": staleness})
    lengths = made.tokens.lengths
    values = torch.rand(sum(lengths), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    loss: Any = made.objective.loss
    of_critic = loss.with_values(made.objective.columns(made.drawn).sequences["reward"], values, lengths)
    advantages: list[list[float]] = []
    for response, own in zip(made.responses, values.split(lengths), strict=True):
        ahead = [*own.tolist()[1:], 0.0]
        gains = [0.9 * after - now for now, after in zip(own.tolist(), ahead, strict=True)]
        gains[-1] += response.score
        count = len(gains)
        advantages.append([sum(0.63 ** (q - p) * gains[q] for q in range(p, count)) for p in range(count)])
    flat = list(itertools.chain.from_iterable(advantages))
    mean, width = sum(flat) / len(flat), deviation(flat, less=0) + 1e-8
    expected, of_value = [], []
    for response, own, own_values in zip(made.responses, advantages, values.split(lengths), strict=True):
        old = response.engine if staleness else response.before
        centred = [(advantage - mean) / width for advantage in own]
        expected.append(surrogate(response, centred, old, 0.1, 0.3, 0.02) / len(own))
        errors = []
        for advantage, value in zip(own, own_values.tolist(), strict=True):
            target, new = advantage + value, 1.4 * value
            clipped = min(max(new, value - 0.15), value + 0.15)
            errors.append(max((new - target) ** 2, (clipped - target) ** 2) / 2)
        of_value.append(sum(errors) / len(errors))
    assert equal(made.losses(**of_critic), expected)
    new_values = ResponseTokens(
        logprobs=1.4 * values, reference_logprobs=values, lengths=lengths, sum_tokens=made.tokens.sum_tokens
    )
    sequences = made.objective.columns(made.drawn).sequences
    assert equal(loss.value(new_values, {**sequences, **of_critic}).tolist(), of_value)


@SEEDS
def test_spo(seed: int) -> None:
    clips = {"clip_low": 0.1, "clip_high": 0.4, "kl_coef": 0.01}
    made = case("spo", seed, spo=clips | {"exploration": 0.2, "least_decay": 0.5, "most_decay": 0.9, "half_life": 0.3})
    value = {uid: (4 * success + 0.5) / 5 for uid, success in STAGE_1.success.items()}
    gains = [min(max(response.score, 0.0), 1.0) - value[response.uid] for response in made.responses]
    mean, width = sum(gains) / BATCH, deviation(gains, less=0) + 1e-6
    count = sum(made.tokens.lengths) / BATCH
    expected = [
        surrogate(response, [(gain - mean) / width] * len(response.now), response.before, 0.1, 0.4, 0.01) / count
        for response, gain in zip(made.responses, gains, strict=True)
    ]
    assert equal(made.losses(), expected)
    priorities: Any = made.objective
    undecided = [math.sqrt(value[prompt.uid] * (1 - value[prompt.uid])) + 0.2 for prompt in PROMPTS]
    assert equal(priorities.priorities([prompt.uid for prompt in PROMPTS]), undecided)


@SEEDS
@STALE
@pytest.mark.parametrize(("scale", "factor"), [("paper", 1.0), ("pg", 25.0)])
@pytest.mark.parametrize("cap", [None, 1.3])
def test_astar(seed: int, staleness: int, scale: str, factor: float, cap: float | None) -> None:
    keys = {"beta1": 0.3, "beta2": 0.02, "importance_cap": cap, "refresh_decay": 0.8}
    made = case("astar", seed, astar=keys, optim={"loss_scale": scale}, rollout={"max_staleness": staleness})
    made.objective.learn(made.drawn, {})
    assert made.objective.loss.gradient_scale == pytest.approx(factor)
    most = cap if cap is not None else 2.0 if staleness else None
    expected = []
    for rollout, response in zip(made.drawn, made.responses, strict=True):
        value = STAGE_1.v_star[response.uid]
        if rollout.reward is not None:  # 4 samples, which weigh 0.8 of themselves, and one more
            value = 0.3 * math.log((3.2 * math.exp(value / 0.3) + math.exp(rollout.reward / 0.3)) / 4.2)
        weight = 1.0 if most is None else min(most, math.exp(sum(response.now) - sum(response.engine)))
        shift = 0.02 * (sum(response.now) - sum(response.reference))
        expected.append(weight * (shift - (response.score - value)) ** 2)
    assert equal(made.losses(), expected)
