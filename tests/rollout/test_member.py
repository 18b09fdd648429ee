"""When an engine counts as hung: what it answers is written down beforehand."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from astar_megatron.cluster.errors import ActorLost, NoAnswer
from astar_megatron.rollout.member import Member, taking_weights, watch

LATE = NoAnswer("engines: beat: no answer\nengine 0: no answer in 30 s", kind="engine", index=0)
DEAD = ActorLost("engines: beat: the process ended\nengine 0: was killed", kind="engine", index=0)


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
    actor = SimpleNamespace(start=SimpleNamespace(remote=object), beat=SimpleNamespace(remote=object))
    member, closing, left, causes = Member(0, actor, "log", 0), threading.Event(), list(answers), []

    def wait(action: str, references: Any, seconds: float) -> list[Any]:
        answer = left.pop(0)
        if not left:
            closing.set()
        if answer is not None:
            raise answer
        return [None]

    def replace(replaced: Member, cause: str) -> None:
        assert replaced is member
        causes.append((len(answers) - len(left), cause))
        closing.set()

    with taking_weights([member] if takes_weights else []):
        watch(wait, lambda: [member], replace, 0.001, closing)
    last = answers[rounds - 1] if rounds else None
    assert causes == ([(rounds, str(last).splitlines()[-1])] if rounds else [])
    assert not member.takes_weights
