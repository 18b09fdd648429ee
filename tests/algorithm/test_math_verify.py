"""How long math-verify may compute, by a library that only does that: the processor's time counts, not the clock's."""

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from astar_megatron.algorithm import rewards
from astar_megatron.algorithm.rewards import verified


def _computes(*_: object, **options: object) -> Any:
    while True:
        pass


def _waits(text: str, **options: object) -> list[str]:
    time.sleep(0.3)
    return [text]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that puts one of the given functions in the place of math-verify, which has 0.1 s each."""

    def put(parse: Callable[..., Any], verify: Callable[..., Any]) -> None:
        monkeypatch.setattr(verified, "_library", lambda: SimpleNamespace(parse=parse, verify=verify))
        monkeypatch.setattr(verified, "_SECONDS", 0.1)

    return put


def test_a_process_that_waits_for_its_turn_is_not_out_of_time(library: Callable[..., None]) -> None:
    library(_waits, lambda gold, guess, **options: gold == guess)
    assert rewards.get("math_verify")(r"\boxed{5}", "5") == 1.0


def test_an_answer_that_takes_too_long_to_read_is_told_from_one_that_is_no_latex(library: Callable[..., None]) -> None:
    library(_computes, _computes)
    with pytest.raises(ValueError, match=r"answer: math-verify had not read it after 0\.1 s of computing, got '5'"):
        rewards.get("math_verify")(r"\boxed{5}", "5")
    library(lambda text, **options: [], _computes)
    with pytest.raises(ValueError, match="answer: expected LaTeX"):
        rewards.get("math_verify")(r"\boxed{5}", "5")


def test_what_takes_too_long_to_compare_is_not_equal(library: Callable[..., None]) -> None:
    library(lambda text, **options: [text], _computes)
    assert rewards.get("math_verify")(r"\boxed{5}", "5") == 0.0
