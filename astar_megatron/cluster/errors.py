"""The errors of a running cluster, apart from what needs Ray: the command line knows them without importing it."""


class ClusterError(RuntimeError):
    """An actor that did not start, died or did not answer in time; the message names it and what it last said."""


class PlaceError(ValueError):
    """No folder can hold the sockets of a run; the message names the variable to set."""
