"""The errors of a running cluster, apart from what needs Ray: the command line knows them without importing it."""


class ClusterError(RuntimeError):
    """An actor that did not start, died or did not answer in time; the message names it and what it last said."""


class ActorLost(ClusterError):  # noqa: N818  it is what happened, not whose fault it is
    """An actor that ended, or does not answer: `kind` is "policy rank" or "engine", `index` which of them."""

    def __init__(self, message: str, *, kind: str, index: int) -> None:
        super().__init__(message)
        self.kind, self.index = kind, index


class NoAnswer(ActorLost):
    """An actor that does not answer in time: it hangs, or waits for another that does."""


class NoFolderError(ValueError):
    """No folder can hold the sockets of a run; the message names the variable to set."""
