"""The reward `math_verify`: answers compared as mathematics by the library math-verify (huggingface/Math-Verify).

It reads the last \\boxed{...} of a response, with those that it ends a list of ("\\boxed{1} and \\boxed{2}"), and asks
the library whether that equals the answer: 1/2, 0.5 and \\frac12 are equal, unlike under `math`. A list is right too
where each part of it equals the answer. Without a box, or where the last one is not closed, a response scores 0.

So does one that the library can't judge within a few seconds of CPU time: a busy machine changes no verdict, while
`reward.timeout_seconds` by the clock are more than what its processes wait for each other. They are measured by
SIGPROF, in place of the library's own alarm by the clock, so this reward runs in the main thread of a process.

Three of its verdicts are not taken. It rounds to six decimals, by which all tiny numbers are equal: numbers below 1
must be equal to four digits too. It reads past a sign of inequality in front, so that "\\neq 5" is 5: the answer must
have the same. And it drops a number's base, so that 52_7 is 52_8: the answer must have the same. Numbers within sets
and tuples are compared as the library does, and so are those that take too long.

It takes "1\\,000" and "1.5e3" for products, so it is given 1000 and 1.5 \\times 10^{3} in their places.
"""

import importlib
import itertools
import logging
import re
import signal
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

from astar_megatron.algorithm.rewards.latex import filled_boxes, last_boxed
from astar_megatron.algorithm.rewards.numbers import TEX_THOUSANDS

_LONGEST = 1000  # characters of an answer; the library's regular expressions take minutes on long text
_SECONDS = 3.0  # of CPU time for reading an answer, for a comparison, and for a number
_RELATIVE = 5e-4  # as far as rounding to four digits moves a number
_DIGITS = 30  # of a number's value
_SIGN = re.compile(
    r"(?:[\s{]|\\[;,: ])*(?:\\(neq?|not|notin|[gl](?:t|eq?|eqq|eqslant))(?![A-Za-z])|([<>\u2260\u2264\u2265]))"
)
_BASE = re.compile(r"(?<![\^0-9])([0-9]+)\s*_\s*(?:\{([^{}]*)\}|([^\s{}]))")
_TEXT_BASE = re.compile(r"_\s*\{\\(?:text|mathrm)\{([^{}]*)\}\}")  # the library loses it: 52_{\text{eight}}
_POWER_OF_TEN = re.compile(r"\s*(-?[0-9]+(?:\.[0-9]+)?)[eE]([+-]?[0-9]{1,3})\s*")  # alone: within more, e is Euler's
_SIGNS = {"<": "lt", ">": "gt", "\u2260": "ne", "\u2264": "le", "\u2265": "ge", "not": "ne"}


class _OutOfTime(BaseException):
    """What is computed takes too long; no Exception, for the library passes over those."""


def math_verify(response: str, answer: str) -> float:
    """Return 1.0 where math-verify finds the response's answer equal to `answer`, else 0.0.

    `answer` is LaTeX or a solution with a \\boxed{...}. Raises ValueError where it is neither, and without the
    library.
    """
    library = _library()
    golds = _golds(library, answer)
    boxes = filled_boxes(response)
    together = ", ".join(map(_boxed, boxes))
    if not boxes or len(together) > 2 * _LONGEST:
        return 0.0
    is_right = _is(library, golds, together)
    if not is_right and len(boxes) > 1:  # one answer in several forms
        is_right = all(_is(library, golds, _boxed(box)) for box in boxes)
    return float(is_right)


def library_version() -> str:
    """Return the version of math-verify; its rules change with it. Raises ValueError."""
    _library()
    return metadata.version("math-verify")


def _golds(library: Any, answer: str) -> Sequence[Any]:
    """What the library reads in the answer of a prompt, one thing at least. Raises ValueError."""
    gold = last_boxed(answer) if "\\boxed" in answer or "\\fbox" in answer else answer
    try:
        golds = _limited(library.parse, _boxed(gold), parsing_timeout=None) if gold and gold.strip() else []
    except _OutOfTime:
        raise ValueError(
            f"answer: math-verify had not read it after {_SECONDS:g} s of computing, got {answer[-80:]!r}; shorten it"
        ) from None
    if not golds:
        raise ValueError(f"answer: expected LaTeX or a solution with a closed \\boxed{{...}}, got {answer[-80:]!r}")
    return golds


def _is(library: Any, golds: Sequence[Any], text: str) -> bool:
    """Whether what the library reads in a text equals the answer, which it reads as `golds`."""
    try:
        guess = _limited(library.parse, text, parsing_timeout=None)
    except _OutOfTime:
        return False
    is_same_form = _sign(golds) == _sign(guess) and _bases(golds) == _bases(guess)
    return is_same_form and any(_equal(library, *pair) for pair in itertools.product(golds, guess))


def _equal(library: Any, gold: Any, guess: Any) -> bool:
    """Whether the library finds both equal, and the numbers that they are, if they are any, are not merely tiny."""
    try:
        if not _limited(library.verify, gold, guess, timeout_seconds=None):
            return False
    except _OutOfTime:
        return False
    if isinstance(gold, str) or gold == guess:
        return True
    try:
        return bool(_limited(_are_close, gold, guess))
    except (Exception, _OutOfTime):  # sympy raises anything
        return True


def _limited(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What the function returns; raises _OutOfTime once this process has computed for _SECONDS."""

    def stop(*_: object) -> None:
        raise _OutOfTime

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, _SECONDS)
    try:
        return function(*arguments, **options)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _sign(parsed: Sequence[Any]) -> str | None:
    """The inequality that an answer begins with, by two letters, as ge; None: it says a value."""
    match = _SIGN.match(parsed[-1]) if parsed and isinstance(parsed[-1], str) else None
    sign = match and (match[1] or match[2])
    return _SIGNS.get(sign, sign)[:2] if sign else None


def _bases(parsed: Sequence[Any]) -> set[tuple[str, str]]:
    """The numbers of an answer that have another base than ten, without leading zeros, each with its base.

    Of a chain, "11_2 = 3", its end alone counts, as for the library.
    """
    latex = parsed[-1].rpartition("=")[2] if parsed and isinstance(parsed[-1], str) else ""
    bases = {(number.lstrip("0"), (braced or bare).strip()) for number, braced, bare in _BASE.findall(latex)}
    return {(number, base) for number, base in bases if base not in ("10", "ten")}


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


def _boxed(latex: str) -> str:
    """The box that the library reads, with numbers as it reads them."""
    latex = _TEXT_BASE.sub(r"_{\1}", TEX_THOUSANDS.sub("", latex))
    if power := _POWER_OF_TEN.fullmatch(latex):
        latex = rf"{power[1]} \times 10^{{{power[2]}}}"
    return f"$\\boxed{{{latex}}}$"


def _library() -> Any:
    """The module math_verify. Raises ValueError."""
    try:
        library = importlib.import_module("math_verify")  # here: optional, and sympy takes a second
    except ImportError as error:
        raise ValueError(
            "reward.name: math_verify needs the package math-verify; install it, or take the reward math"
        ) from error
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it says that its own alarm is off
    return library
