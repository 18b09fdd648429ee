"""The reward `math_verify`: answers compared as mathematics by the library math-verify (huggingface/Math-Verify).

It reads the last \\boxed{...} of a response, else its last 1000 characters, and asks the library whether that equals
the answer: 1/2, 0.5 and \\frac12 are equal, unlike under `math`. A response that the library can't judge within a few
seconds scores 0. The library measures them by SIGALRM, so this reward runs in the main thread of a process.

Two of its verdicts are not taken. It rounds to six decimals, by which all tiny numbers are equal: numbers below 1 must
be equal to four digits too. And it reads past a sign in front, so that "\\neq 5" is 5: the answer must have such a sign
too. Numbers within sets and tuples are compared as the library does, and so are those that take too long.
"""

import functools
import importlib
import itertools
import logging
import re
import signal
from collections.abc import Callable, Sequence
from decimal import Context, Decimal
from importlib import metadata
from typing import Any

from astar_megatron.algorithm.rewards.latex import last_boxed

_LONGEST = 1000  # characters of an answer; the library's regular expressions take minutes on long text
_SECONDS = 3  # for reading an answer, for a comparison, and for a number
_RELATIVE = 1e-4  # not less: 0.166667 is 1/6 by six decimals, and so it is here
_DIGITS = 30  # of a number's value
_SIGN = re.compile(r"\s*(?:\\(?:neq?|not|(ge)q?|(ge)qslant|(le)q?|(le)qslant)(?![A-Za-z])|\N{NOT EQUAL TO})")


def math_verify(response: str, answer: str) -> float:
    """Return 1.0 where math-verify finds the response's answer equal to `answer`, else 0.0.

    `answer` is LaTeX or a solution with a \\boxed{...}. Raises ValueError where it is neither, and without the
    library.
    """
    library = _library()
    gold = last_boxed(answer) if "\\boxed" in answer or "\\fbox" in answer else answer
    if gold is None or not gold.strip() or not (golds := library.parse(_boxed(gold), parsing_timeout=_SECONDS)):
        raise ValueError(f"answer: expected LaTeX or a solution with a closed \\boxed{{...}}, got {answer[-80:]!r}")
    text = _answer_in(response)
    guess = library.parse(text, parsing_timeout=_SECONDS) if text is not None else []
    right = any(_equal(library, *pair) for pair in itertools.product(golds, guess))
    return float(right and _sign(golds) == _sign(guess))


def verified_answer(response: str) -> str | None:
    """Return what `math_verify` compares: a number by its value, all else as the library writes what it read.

    Values are equal where six decimals are, of numbers below 1 six digits. None where the library reads nothing.
    """
    return _written(text) if (text := _answer_in(response)) is not None else None


def library_version() -> str:
    """Return the version of math-verify; its rules change with it. Raises ValueError."""
    _library()
    return metadata.version("math-verify")


def _answer_in(response: str) -> str | None:
    """The part of a response that the library is to read; None where it is too long."""
    boxed = last_boxed(response)
    if boxed is None:
        return response[-_LONGEST:]
    return _boxed(boxed) if len(boxed) <= _LONGEST else None


def _equal(library: Any, gold: Any, guess: Any) -> bool:
    """Whether the library finds both equal, and the numbers that they are, if they are any, are not merely tiny."""
    if not library.verify(gold, guess, timeout_seconds=_SECONDS):
        return False
    if isinstance(gold, str) or gold == guess:
        return True
    return _limited(lambda: _are_close(gold, guess)) is not False


def _sign(parsed: Sequence[Any]) -> str | None:
    """What stands before the text of an answer: "ge", "le" or "not"; None: it says a value."""
    match = _SIGN.match(parsed[-1]) if parsed and isinstance(parsed[-1], str) else None
    if match is None:
        return None
    return match[match.lastindex] if match.lastindex else "not"


def _are_close(gold: Any, guess: Any) -> bool:
    """Whether two expressions are no numbers below 1 that differ in their first digits."""
    first, second = _value(gold), _value(guess)
    if first is None or second is None or max(abs(first), abs(second)) >= 1:
        return True
    return bool(abs(first - second) <= _RELATIVE * max(abs(first), abs(second)))


def _value(expression: Any) -> Any:
    """The real number, a sympy Float, that an expression or the right side of an equation is; None where it is none."""
    sympy = importlib.import_module("sympy")
    side = expression.rhs if isinstance(expression, sympy.Eq) else expression
    if not isinstance(side, sympy.Expr) or side.free_symbols:
        return None
    number = side.evalf(_DIGITS).doit()  # doit: 50% is 50.0 times an unevaluated 1/100
    if not isinstance(number, sympy.Float | sympy.Integer) or not number.is_finite:
        return None
    return sympy.Integer(0) if getattr(number, "_prec", 0) == 1 else number  # 1: no digit of it differs from 0


@functools.lru_cache(maxsize=2**16)  # an evaluation asks three times for each response
def _written(text: str) -> str | None:
    parsed = _limited(lambda: _library().parse(text, parsing_timeout=None))
    if not parsed:
        return None
    value, sign = parsed[0], _sign(parsed)
    number = None if isinstance(value, str) else _limited(lambda: _value(value))
    is_exact = number is None or getattr(value, "is_Integer", False)
    written = _limited(lambda: str(value)) if is_exact else _rounded(Decimal(str(number)))
    written = (written or "").strip()
    return f"{sign} {written}" if sign and written else written or None


def _rounded(number: Decimal) -> str:
    digits = min(_DIGITS, 6 + max(0, number.adjusted() + 1))
    short = Context(prec=digits).plus(number).normalize()
    return f"{short:f}" if abs(short.adjusted()) < _DIGITS else str(short)


def _limited[T](function: Callable[[], T]) -> T | None:
    """What a function returns; None where it fails or computes too long.

    By a timer of its own: an evaluation asks in the driver, where the library's SIGALRM is the end of a run's grace.
    """
    before = signal.signal(signal.SIGVTALRM, _stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, _SECONDS)
    try:
        return function()
    except (Exception, _TooLong):  # sympy raises anything
        return None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
        signal.signal(signal.SIGVTALRM, before)


class _TooLong(BaseException):
    """No Exception, which the library would take for one of its own."""


def _stop(*_: object) -> None:
    raise _TooLong


def _boxed(latex: str) -> str:
    return f"$\\boxed{{{latex}}}$"


def _library() -> Any:
    """The module math_verify. Raises ValueError."""
    try:
        library = importlib.import_module("math_verify")  # here: optional, and sympy takes a second
    except ImportError as error:
        raise ValueError(
            "reward.name: math_verify needs the package math-verify; install it, or take the reward math"
        ) from error
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it prints each response that takes too long
    return library
