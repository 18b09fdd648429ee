"""When an engine counts as hung: what it answers is written down beforehand."""

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from astar_megatron.cluster.errors import ActorLost, NoAnswer
from astar_megatron.rollout import member as engines
from astar_megatron.rollout.member import Member, taking_weights, watch

LATE = NoAnswer("engines: beat: no answer", kind="engine", causes={0: "engine 0: no answer in 30 s"})
DEAD = ActorLost("engines: beat: the process ended\nengine 1: was killed", kind="engine", index=1)


def actor(beat: Callable[[], Any]) -> Any:
    return SimpleNamespace(start=SimpleNamespace(remote=object), beat=SimpleNamespace(remote=beat))


def wait(action: str, references: Any, seconds: float) -> list[Any]:
    """A beat's reference is what it will answer."""
    for answer in references:
        if isinstance(answer, Exception):
            raise answer
    return list(references)


@pytest.mark.parametrize(
    ("answers", "takes_weights", "rounds"),
    [
        ([None, None, None], False, None),
        ([LATE], False, 1),
        ([LATE, None, LATE, None], True, None),  # it waited for another, and the ranks have given that up
        ([None, LATE, LATE], True, 3),
        ([DEAD], True, 1),
    ],
)
def test_an_engine_that_takes_weights_may_miss_a_beat_and_no_other(
    answers: list[Exception | None], takes_weights: bool, rounds: int | None
) -> None:
    closing, left, causes = threading.Event(), list(answers), []

    def beat() -> Exception | None:
        answer = left.pop(0)
        if not left:
            closing.set()
        return answer

    member = Member(0, actor(beat), "log", 0)

    def replace(replaced: Member, cause: str) -> None:
        assert replaced is member
        causes.append((len(answers) - len(left), cause))
        closing.set()

    with taking_weights([member] if takes_weights else []):
        watch(wait, lambda: [member], replace, 0.001, closing)
    cause = "engine 1: was killed" if DEAD in answers else LATE.causes[0]
    assert causes == ([(rounds, cause)] if rounds else [])
    assert not member.takes_weights


def test_engines_that_hang_together_are_replaced_together(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, closing, replaced = [0.0], threading.Event(), dict[int, str]()
    monkeypatch.setattr(engines, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    members = [Member(index, actor(lambda index=index: index), "log", 0) for index in range(41)]

    def wait_by_clock(action: str, references: Any, seconds: float) -> list[Any]:
        """All but engine 0 hang."""
        if any(references):
            clock[0] += seconds
            causes = {index: f"engine {index}: no answer in {seconds:.0f} s" for index in references if index}
            raise NoAnswer(action, kind="engine", causes=causes)
        return list(references)

    def replace(member: Member, cause: str) -> None:
        replaced[member.index] = cause
        closing.set()

    watch(wait_by_clock, lambda: members, replace, 5.0, closing)
    assert replaced == {index: f"engine {index}: no answer in 5 s" for index in range(1, 41)} and clock[0] == 7.0


def test_engines_whose_answers_lay_there_while_the_driver_was_held_up_are_well() -> None:
    closing, waits = threading.Event(), list[float]()

    def wait_held_up(action: str, references: Any, seconds: float) -> list[Any]:
        waits.append(seconds)
        if len(waits) == 1:
            raise LATE
        closing.set()
        return list(references)

    def replace(member: Member, cause: str) -> None:
        raise AssertionError(cause)

    watch(wait_held_up, lambda: [Member(0, actor(object), "log", 0)], replace, 0.001, closing)
    assert len(waits) == 3


def test_an_engine_that_is_asked_when_another_dies_has_until_the_next_beat() -> None:
    closing, causes = threading.Event(), list[str]()
    hangs, dies = Member(0, actor(lambda: LATE), "log", 0), Member(1, actor(lambda: DEAD), "log", 0)
    running = iter([[dies, hangs], [hangs]])

    def replace(member: Member, cause: str) -> None:
        causes.append(cause)
        if member is hangs:
            closing.set()

    watch(wait, lambda: next(running), replace, 0.001, closing)
    assert causes == ["engine 1: was killed", LATE.causes[0]]
