"""A reward whose response says how it shall fail."""

import math
import os
import re
import sys
from pathlib import Path


def reward(response: str, answer: str) -> float:
    """Return 0.5, or what the response asks for."""
    print("rewards may print", file=sys.stdout)
    match response:
        case "hang":
            re.match("(a+)+$", "a" * 60 + "b")  # in C: neither a thread nor a signal's handler would run
        case "die":
            os._exit(3)
        case "raise":
            raise KeyError("boom")
        case "nan":
            return math.nan
        case "two":
            return 2.0
        case "text":
            return "1.0"  # type: ignore[return-value]
        case "nothing":
            return None  # type: ignore[return-value]
    if answer.startswith("touch "):
        Path(answer.removeprefix("touch ")).touch()
        re.match("(a+)+$", "a" * 60 + "b")
    if answer == "unreadable":
        raise ValueError("answer: expected something else")
    return 0.5
