"""Calls on actors, written as calls on the objects that they hold: an editor and a type checker follow them there."""

from collections.abc import Callable
from typing import Any, Self


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
