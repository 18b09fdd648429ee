"""An engine that computes with other weights than it holds is named; one that rounds as its type does is not."""

import dataclasses
import math
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
from fake_engines import FakeEngines

from astar_megatron.cluster.errors import ClusterError
from astar_megatron.rollout.engine import Response
from astar_megatron.rollout.member import Member
from astar_megatron.run.decoding import DecodePath, StaleEngine
from astar_megatron.run.fleet import Fleet
from astar_megatron.run.weights import WeightSync


class Policy:
    """Gives each token -0.5, as the fake engines do, but for `gap` at the last."""

    def __init__(self, dtype: str, gap: float) -> None:
        self.dtype, self._gap = dtype, gap
        self.scored: list[tuple[int, int]] = []  # tokens of each sequence, and of its prompt

    def logprobs(self, token_ids: Sequence[Sequence[int]], prompt_tokens: Sequence[int]) -> list[list[float]]:
        self.scored = [(len(ids), count) for ids, count in zip(token_ids, prompt_tokens, strict=True)]
        rows = [[-0.5] * (total - count) for total, count in self.scored]
        rows[-1][-1] += self._gap  # the last engine's
        return rows


class Following(FakeEngines):
    """Log-probs change a little with each version, but not those of engines in `stale`."""

    stale: frozenset[int] = frozenset()

    def responses(self, streams: Sequence[Any], seconds: float) -> list[tuple[Any, list[Response] | None]]:
        return [(stream, self._moved(stream, answers)) for stream, answers in super().responses(streams, seconds)]

    def _moved(self, stream: int, answers: list[Response] | None) -> list[Response] | None:
        moved = 0.0 if self._engine_of[stream] in self.stale else 1e-6 * self.version
        return answers and [
            dataclasses.replace(answer, token_logprobs=tuple(value - moved for value in answer.token_logprobs))
            for answer in answers
        ]


def look(path: DecodePath, engines: FakeEngines, policy: Policy, version: int, weights: int | None = None) -> str:
    """After a publish of `version`; weights are as different as versions."""
    engines.version = version
    return path.look(engines, policy, version, version if weights is None else weights)


@pytest.fixture
def engines() -> Following:
    return Following(lambda request: (tuple(range(53, 53 + 7)), True), num_engines=3)


@pytest.fixture
def path() -> DecodePath:
    return DecodePath(131, 64)


@pytest.mark.parametrize(("dtype", "gap"), [("float32", 5e-3), ("bfloat16", 0.4)])
def test_what_a_type_rounds_is_no_fault(dtype: str, gap: float, engines: Following, path: DecodePath) -> None:
    policy = Policy(dtype, gap)
    assert look(path, engines, policy, 0) == ""
    assert f"version 4: greedy tokens within {gap:.1e} nats" in look(path, engines, policy, 4)
    assert policy.scored == [(16 + 7, 16)] * 3
    assert [engine for engine, _ in engines.asked] == [0, 1, 2] * 2
    assert all(request.greedy and max(request.prompt.token_ids) < 131 for _, request in engines.asked)
    assert look(path, engines, policy, 5) == "" and len(engines.asked) == 6  # nobody is asked again


@pytest.mark.parametrize(("dtype", "gap"), [("float32", 5e-2), ("bfloat16", -1.5), ("bfloat16", math.nan)])
def test_a_decode_path_of_other_weights_is_named(dtype: str, gap: float, engines: Following, path: DecodePath) -> None:
    words = (
        "weights of version 4: engine 2 holds them bit by bit, but does not compute with them: log-probs of 7 greedy"
    )
    with pytest.raises(StaleEngine, match=words):
        look(path, engines, Policy(dtype, gap), 4)


def test_a_decode_path_that_repeats_itself_while_weights_change_is_named(engines: Following, path: DecodePath) -> None:
    engines.stale = frozenset({1})
    policy = Policy("bfloat16", 0.0)
    for version in (0, 1, 2):
        assert look(path, engines, policy, version) == ""
    with pytest.raises(StaleEngine, match=r"version 3: engine 1 holds .* in 3 changes .* 7 greedy tokens have stayed"):
        look(path, engines, policy, 3)


def test_engines_are_proved_by_a_change_of_the_weights_alone(engines: Following, path: DecodePath) -> None:
    policy = Policy("bfloat16", 0.0)
    for version in range(9):  # a run whose steps are skipped: engines repeat themselves, and should
        assert path.look(engines, policy, version, "the same") == ""
    assert "version 9" in look(path, engines, policy, 9)


def test_an_engine_that_takes_another_s_place_is_looked_at_anew(engines: Following, path: DecodePath) -> None:
    policy = Policy("bfloat16", 0.0)
    look(path, engines, policy, 0)
    assert look(path, engines, policy, 1)
    engines.stale = frozenset({1})
    path.forget(1)
    for version in (2, 3, 4):
        assert look(path, engines, policy, version) == ""
    with pytest.raises(StaleEngine, match="engine 1 "):
        look(path, engines, policy, 5)


def test_an_engine_that_is_replaced_during_a_look_is_looked_at_anew(engines: Following, path: DecodePath) -> None:
    class Slow(Policy):
        """Engine 1 is replaced while this scores its tokens for the first time."""

        def logprobs(self, token_ids: Sequence[Sequence[int]], prompt_tokens: Sequence[int]) -> list[list[float]]:
            if not self.scored:
                path.forget(1)
            return super().logprobs(token_ids, prompt_tokens)

    policy = Slow("bfloat16", 0.0)
    for version in (0, 1):
        assert look(path, engines, policy, version) == ""
    assert look(path, engines, policy, 2)


def test_an_engine_that_could_not_be_given_its_weights_is_looked_at_anew(engines: Following, path: DecodePath) -> None:
    def publish(version: int, members: Sequence[Any]) -> None:
        raise ClusterError("policy rank 0: was killed by SIGKILL")

    policy, fleet = Policy("bfloat16", 0.0), Fleet.__new__(Fleet)
    fleet._moving, fleet._published, fleet._decode_path = threading.Lock(), 1, path
    fleet._weights = cast(WeightSync, SimpleNamespace(publish=publish))
    look(path, engines, policy, 0)
    assert look(path, engines, policy, 1)
    with pytest.raises(ClusterError):
        fleet.heal(cast(Member, SimpleNamespace(index=1)))
    assert not path.is_proved


@pytest.mark.parametrize("max_tokens", [2, 17, 20])
def test_engines_that_take_few_tokens_are_asked_for_few(max_tokens: int) -> None:
    class Strict(FakeEngines):
        def generate(self, engine: int, requests: Sequence[Any], sampling: Any) -> int:
            ((_, request),) = requests
            assert len(request.prompt.token_ids) + sampling.max_response_tokens <= max_tokens
            return super().generate(engine, requests, sampling)

    look(DecodePath(131, max_tokens), strict := Strict(lambda request: ((53,), True)), Policy("float32", 0.0), 1)
    assert len(strict.asked) == 1


def test_an_engine_may_take_its_time(path: DecodePath) -> None:
    class Late(Following):
        """Says nothing at first."""

        waited = False

        def responses(self, streams: Sequence[Any], seconds: float) -> list[tuple[Any, list[Response] | None]]:
            if not self.waited:
                self.waited = True
                return []
            return super().responses(streams, seconds)

    late = Late(lambda request: ((53,), True))
    assert look(path, late, Policy("float32", 0.0), 0) == ""
    assert look(path, late, Policy("float32", 0.0), 1)


def test_an_engine_that_is_not_there_is_looked_at_another_time(engines: Following, path: DecodePath) -> None:
    look(path, engines, Policy("float32", 5e-4), 0)
    engines.end(1)
    assert look(path, engines, Policy("float32", 5e-4), 4) == look(path, engines, Policy("float32", 5e-4), 5) == ""
    engines.join(1)
    with pytest.raises(StaleEngine, match="engine 1 holds them"):
        look(path, engines, Policy("float32", 5e-2), 6)
    assert look(path, engines, Policy("float32", 5e-4), 7)
    assert [engine for engine, _ in engines.asked] == [0, 1, 2, 0, 2, 1, 1]  # nobody that is proved is asked again


def test_engines_are_asked_all_at_once(path: DecodePath) -> None:
    class Waiting(Following):
        """Nobody answers before each has been asked."""

        def responses(self, streams: Sequence[Any], seconds: float) -> list[tuple[Any, list[Response] | None]]:
            assert len(self.asked) % 3 == 0
            return super().responses(streams, seconds)

    waiting = Waiting(lambda request: ((53,), True), num_engines=3, streams_at_once=2)
    assert look(path, waiting, Policy("float32", 0.0), 0) == ""
    assert look(path, waiting, Policy("float32", 0.0), 1)
