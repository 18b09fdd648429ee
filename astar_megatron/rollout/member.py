"""An engine as the driver knows it, and whether it is well."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from astar_megatron.cluster.errors import NoAnswer

_LOOK_SECONDS = 0.001  # 0 would be the default of a wait


class Member:
    """The engine of one index, for as long as its actor lives; `log` names its start log."""

    def __init__(self, index: int, actor: Any, log: str, num_ends: int) -> None:
        self.index, self.actor, self.log = index, actor, log
        self.starting = actor.start.remote()
        self.num_ends = num_ends  # of those before it, without an answer in between
        self.runs = self.serves = self.is_lost = False  # has started; has the weights to draw with; is being replaced
        self.takes_weights, self.num_missed = False, 0  # is asked to; beats without an answer, one after the other


@contextlib.contextmanager
def taking_weights(members: Sequence[Member]) -> Iterator[None]:
    """In the body these engines wait for the ranks, and so for each other."""
    for member in members:
        member.takes_weights = True
    try:
        yield
    finally:
        for member in members:
            member.takes_weights = False


def watch(
    wait: Callable[[str, Sequence[Any], float], list[Any]],
    running: Callable[[], list[Member]],
    replace: Callable[[Member, str], None],
    patience_seconds: float,
    closing: threading.Event,
) -> None:
    """Ask every engine each `patience_seconds` whether it is well until `closing`, and replace one that is not.

    One that takes weights can't answer while the ranks wait for another that hangs: they give up in between.
    """
    while not closing.is_set():
        until = time.monotonic() + patience_seconds
        beats = {member.actor.beat.remote(): member for member in running()}
        late: Mapping[int, str] = {}
        try:
            wait("engines: beat", list(beats), patience_seconds)  # for all: those that hang may be many
        except NoAnswer as error:
            late = error.causes
        except Exception:
            pass  # whoever has failed says so below
        for reference, member in beats.items():
            if member.index in late:
                member.num_missed += 1
                if not (member.takes_weights and member.num_missed == 1):
                    replace(member, late[member.index])
                continue
            try:
                wait("engines: beat", [reference], _LOOK_SECONDS)
                member.num_missed = 0
            except NoAnswer:  # the failure of another has cut the wait short: the next beat tells
                continue
            except Exception as error:
                replace(member, cause_of(error))
        closing.wait(max(0.0, until - time.monotonic()))


def cause_of(error: Exception) -> str:
    """The last line of what is said of a failed call: whose, and why."""
    return str(error).splitlines()[-1]
