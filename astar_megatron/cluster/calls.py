"""Calls on actors, written as calls on the objects that they hold: an editor and a type checker follow them there."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import ray

from astar_megatron.cluster.errors import ClusterError


class Call:
    """Method and arguments of a call, to be made in another process.

    `Call.of(lambda rank: rank.step(batch))` hears the one call that the function makes; the object itself is not there.
    """

    method: str
    arguments: tuple[Any, ...]

    @classmethod
    def of(cls, call: Callable[[Any], Any]) -> Self:
        heard = cls()
        call(heard)
        return heard

    def __getattr__(self, method: str) -> Callable[..., None]:
        def hear(*arguments: Any) -> None:
            self.method, self.arguments = method, arguments

        return hear


def stored[T](value: T) -> T:
    """Return what stands for a large value among the arguments of calls: Ray gives each actor the value.

    It is written once, and goes to each node once. As it is, it would be written anew for every call.
    """
    return ray.put(value)  # type: ignore[return-value]


def answers_of[K](wait: Callable[[str, Sequence[Any]], list[Any]], action: str, calls: Mapping[K, Any]) -> dict[K, Any]:
    """Return the answer to each call, or the ClusterError that it failed of; `wait` is a cluster's.

    They are waited for one by one only where one has failed: a wait for all costs little more than a wait for one.
    """
    with contextlib.suppress(ClusterError):
        return dict(zip(calls, wait(action, list(calls.values())), strict=True))
    answers: dict[K, Any] = {}
    for key, call in calls.items():
        try:
            answers[key] = wait(action, [call])[0]
        except ClusterError as error:
            answers[key] = error
    return answers
