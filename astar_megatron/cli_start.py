"""What the command line makes sure of before all else: three streams that take all, a current folder that is there."""

import io
import os
import sys
from pathlib import Path


def check_start() -> None:
    """Open the closed ones of stdin, stdout and stderr on nothing. Raises OSError where the current folder is gone.

    Else the next file that is opened takes a closed one's number, and what is said on stderr goes into that. What the
    encoding of stdout or stderr lacks, as of a file's name, is written as an escape.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            descriptor = os.open(os.devnull, os.O_RDWR)
            os.dup2(descriptor, number)
            if descriptor != number:
                os.close(descriptor)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        Path.cwd()
    except FileNotFoundError:
        raise OSError("the current folder is gone; change to one that is there (cd)") from None
