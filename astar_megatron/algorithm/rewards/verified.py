"""The reward `math_verify`: answers compared as mathematics by the library math-verify (huggingface/Math-Verify).

It reads the last \\boxed{...} of a response, else its last 1000 characters, and asks the library whether that equals
the answer: 1/2, 0.5 and \\frac12 are equal, unlike under `math`. A response that the library can't judge within a few
seconds scores 0. The library measures them by SIGALRM, so this reward runs in the main thread of a process.
"""

import importlib
import logging
from collections.abc import Callable
from importlib import metadata
from typing import Any

from astar_megatron.algorithm.rewards.latex import last_boxed

_LONGEST = 1000  # characters of an answer; the library's regular expressions take minutes on long text
_SECONDS = 3  # for reading an answer, and for a comparison


def math_verify(response: str, answer: str) -> float:
    """Return 1.0 where math-verify finds the response's answer equal to `answer`, else 0.0.

    `answer` is LaTeX or a solution with a \\boxed{...}. Raises ValueError where it is neither, and without the
    library.
    """
    parse, verify = _library()
    gold = last_boxed(answer) if "\\boxed" in answer or "\\fbox" in answer else answer
    if gold is None or not gold.strip() or not (golds := parse(_boxed(gold), parsing_timeout=_SECONDS)):
        raise ValueError(f"answer: expected LaTeX or a solution with a closed \\boxed{{...}}, got {answer[-80:]!r}")
    boxed = last_boxed(response)
    text = response[-_LONGEST:] if boxed is None else _boxed(boxed)
    if len(text) > _LONGEST + len(_boxed("")):
        return 0.0
    guess = parse(text, parsing_timeout=_SECONDS)
    return float(bool(guess) and verify(golds, guess, timeout_seconds=_SECONDS))


def library_version() -> str:
    """Return the version of math-verify; its rules change with it. Raises ValueError."""
    _library()
    return metadata.version("math-verify")


def _boxed(latex: str) -> str:
    return f"$\\boxed{{{latex}}}$"


def _library() -> tuple[Callable[..., Any], Callable[..., Any]]:
    try:
        library = importlib.import_module("math_verify")  # here: optional, and sympy takes a second
    except ImportError as error:
        raise ValueError(
            "reward.name: math_verify needs the package math-verify; install it, or take the reward math"
        ) from error
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it prints each response that takes too long
    return library.parse, library.verify
