"""An engine that computes with other weights than it holds is named; one that rounds as its type does is not."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
from fake_engines import FakeEngines

from astar_megatron.rollout.engine import Response
from astar_megatron.run.decoding import StaleEngine, check_decoding


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


@pytest.fixture
def engines() -> FakeEngines:
    return FakeEngines(lambda request: (tuple(range(53, 53 + 7)), True), num_engines=3)


@pytest.mark.parametrize(("dtype", "gap"), [("float32", 5e-4), ("bfloat16", 0.4)])
def test_what_a_type_rounds_is_no_fault(dtype: str, gap: float, engines: FakeEngines) -> None:
    policy = Policy(dtype, gap)
    assert check_decoding(engines, policy, 4, 131, 64) == pytest.approx(gap)
    assert policy.scored == [(16 + 7, 16)] * 3
    assert [engine for engine, _ in engines.asked] == [0, 1, 2]
    assert all(request.greedy and max(request.prompt.token_ids) < 131 for _, request in engines.asked)


@pytest.mark.parametrize(("dtype", "gap"), [("float32", 5e-3), ("bfloat16", -1.5), ("bfloat16", math.nan)])
def test_a_stale_decode_path_is_named(dtype: str, gap: float, engines: FakeEngines) -> None:
    words = (
        "weights of version 4: engine 2 holds them bit by bit, but does not compute with them: log-probs of 7 greedy"
    )
    with pytest.raises(StaleEngine, match=words):
        check_decoding(engines, Policy(dtype, gap), 4, 131, 64)


@pytest.mark.parametrize("max_tokens", [2, 17, 20])
def test_engines_that_take_few_tokens_are_asked_for_few(max_tokens: int) -> None:
    class Strict(FakeEngines):
        def generate(self, engine: int, requests: Sequence[Any], sampling: Any) -> int:
            ((_, request),) = requests
            assert len(request.prompt.token_ids) + sampling.max_response_tokens <= max_tokens
            return super().generate(engine, requests, sampling)

    assert check_decoding(Strict(lambda request: ((53,), True)), Policy("float32", 0.0), 1, 131, max_tokens) == 0.0


def test_an_engine_may_take_its_time() -> None:
    class Late(FakeEngines):
        """Says nothing at first."""

        waited = False

        def responses(self, streams: Sequence[Any], seconds: float) -> list[tuple[Any, list[Response] | None]]:
            if not self.waited:
                self.waited = True
                return []
            return super().responses(streams, seconds)

    assert check_decoding(Late(lambda request: ((53,), True)), Policy("float32", 0.0), 1, 131, 64) == 0.0


def test_an_engine_that_is_not_there_is_looked_at_another_time(engines: FakeEngines) -> None:
    engines.end(1)
    assert check_decoding(engines, Policy("float32", 5e-4), 4, 131, 64) is None
    assert [engine for engine, _ in engines.asked] == [0, 2]
    with pytest.raises(StaleEngine, match="engine 2 holds them"):
        check_decoding(engines, Policy("float32", 5e-3), 4, 131, 64)
    engines.join(1)
    assert check_decoding(engines, Policy("float32", 5e-4), 4, 131, 64) == pytest.approx(5e-4)
