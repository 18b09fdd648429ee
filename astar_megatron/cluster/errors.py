"""The errors of a running cluster, apart from what needs Ray: the command line knows them without importing it."""

from collections.abc import Mapping


class ClusterError(RuntimeError):
    """An actor that did not start, died or did not answer in time; the message names it and what it last said."""


class ActorLost(ClusterError):  # noqa: N818  it is what happened, not whose fault it is
    """An actor that ended, or does not answer: `kind` is "policy rank" or "engine", `index` which of them."""

    def __init__(self, message: str, *, kind: str, index: int) -> None:
        super().__init__(message)
        self.kind, self.index = kind, index


class NoAnswer(ActorLost):
    """Actors that do not answer in time: they hang, or wait for others that do. It is lost of the first of them.

    `causes` has each one's of that kind, by index.
    """

    def __init__(self, message: str, *, kind: str, causes: Mapping[int, str]) -> None:
        super().__init__(message, kind=kind, index=next(iter(causes)))
        self.causes = causes


class NoFolderError(ValueError):
    """No folder can hold the sockets of a run; the message names the variable to set."""
