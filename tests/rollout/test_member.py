"""When an engine counts as hung: what it answers is written down beforehand."""

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from astar_megatron.cluster.errors import ActorLost, NoAnswer
from astar_megatron.rollout import member as engines
from astar_megatron.rollout.member import Member, taking_weights, watch

LATE = NoAnswer("engines: beat: no answer\nengine 0: no answer in 30 s", kind="engine", index=0)
DEAD = ActorLost("engines: beat: the process ended\nengine 0: was killed", kind="engine", index=0)


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
    last = answers[rounds - 1] if rounds else None
    assert causes == ([(rounds, str(last).splitlines()[-1])] if rounds else [])
    assert not member.takes_weights


def test_engines_that_hang_together_are_replaced_together(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, closing, replaced = [0.0], threading.Event(), list[int]()
    monkeypatch.setattr(engines, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    beats = [None, *(NoAnswer("no answer", kind="engine", index=index) for index in range(1, 41))]
    members = [Member(index, actor(lambda beat=beat: beat), "log", 0) for index, beat in enumerate(beats)]

    def wait_by_clock(action: str, references: Any, seconds: float) -> list[Any]:
        clock[0] += seconds if any(references) else 0.0
        return wait(action, references, seconds)

    def replace(member: Member, cause: str) -> None:
        replaced.append(member.index)
        closing.set()

    watch(wait_by_clock, lambda: members, replace, 5.0, closing)
    assert replaced == list(range(1, 41)) and clock[0] < 5.0 + 2.0 + 0.1
