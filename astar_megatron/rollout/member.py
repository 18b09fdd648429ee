"""An engine as the driver knows it, and whether it is well."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from astar_megatron.cluster.errors import NoAnswer

_LATE_SECONDS = 2.0
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
        causes = _silent(wait, list(beats), patience_seconds)
        # Once more: answers may have come while this process itself was held up.
        late = _silent(wait, [beat for beat, member in beats.items() if member.index in causes], _LATE_SECONDS)
        for reference, member in beats.items():
            if member.index in late:
                member.num_missed += 1
                if not (member.takes_weights and member.num_missed == 1):
                    replace(member, causes[member.index])
                continue
            try:
                wait("engines: beat", [reference], _LOOK_SECONDS)
                member.num_missed = 0
            except NoAnswer:  # the failure of another has cut the wait short: the next beat tells
                continue
            except Exception as error:
                replace(member, cause_of(error))
        closing.wait(max(0.0, until - time.monotonic()))


def _silent(wait: Callable[..., object], beats: Sequence[Any], seconds: float) -> Mapping[int, str]:
    """Return why, by index, of engines that do not answer; of none where another fails meanwhile: the next beat tells.

    All are waited for at once: those that hang may be many.
    """
    try:
        wait("engines: beat", beats, seconds)
    except NoAnswer as error:
        return error.causes
    except Exception:  # it says so where each is looked at
        pass
    return {}


def cause_of(error: Exception) -> str:
    """The last line of what is said of a failed call: whose, and why."""
    return str(error).splitlines()[-1]
