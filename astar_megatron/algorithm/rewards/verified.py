"""The reward `math_verify`: answers compared as mathematics by the library math-verify (huggingface/Math-Verify).

It reads the last \\boxed{...} of a response, with those that it ends a list of ("\\boxed{1} and \\boxed{2}"), and asks
the library whether that equals the answer: 1/2, 0.5 and \\frac12 are equal, unlike under `math`. A list is right too
where each part of it equals the answer. Without a box, or where the last one is not closed, a response scores 0.

So does one that the library can't judge within a few seconds of CPU time: a busy machine changes no verdict, while
`reward.timeout_seconds` by the clock are more than what its processes wait for each other. They are measured by
SIGPROF, in place of the library's own alarm by the clock, so this reward runs in the main thread of a process.

Two of its verdicts are not taken. It rounds to six decimals, by which all tiny numbers are equal: numbers below 1
must be equal to four digits too. It reads past a sign of inequality in front, so that "\\neq 5" is 5: the answer must
have the same. Numbers within sets and tuples are compared as the library does, and so are those that take too long.

What it misreads it is given in other words, first of all without what changes its looks alone (dressing.py): "5.",
"= 5", "\\approx 5" and "\\boldsymbol{5}" were no 5. It takes "1\\,000" and "1.5e3" for products: it reads 1000 and,
so that it stays one number behind a "/" too, \\frac{1.5\\times10^{3}}{1} in their places. "2e-3" may be 2e less 3 as
well: an answer is right where it is by either reading of both. And it drops a number's base, so that 52_7 were 52_8: it
reads the base as a factor, \\beta with the base's name in hexadecimal digits, and 1A2_{16} as one symbol.
"""

import importlib
import itertools
import logging
import re
import signal
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

from astar_megatron.algorithm.rewards.dressing import undressed
from astar_megatron.algorithm.rewards.latex import filled_boxes, last_boxed
from astar_megatron.algorithm.rewards.numbers import TEX_THOUSANDS

_LONGEST = 1000  # characters of an answer; the library's regular expressions take minutes on long text
_SECONDS = 3.0  # of CPU time for reading an answer, for a comparison, and for a number
_RELATIVE = 5e-4  # as far as rounding to four digits moves a number
_DIGITS = 30  # of a number's value
_SIGN = re.compile(
    r"(?:[\s{]|\\[;,: ])*(?:\\(neq?|not|notin|[gl](?:t|eq?|eqq|eqslant))(?![A-Za-z])|([<>\u2260\u2264\u2265]))"
)
_GAP = r"(?:\s|~|\\[,;:! ])*"
_NUMBER_IN_BRACES = re.compile(r"(?<![\^\w}\]])\{([0-9A-Za-z]+)\}(?=\s*_)")  # with a base behind it
_IN_BRACES = r"\{(?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*\}"
_BASE = re.compile(  # number, bracket behind it, base
    rf"(?<![\^0-9])([0-9]{{1,3}}(?:,[0-9]{{3}})+|[0-9]+(?:(?:[A-Za-z]+[0-9]+)+[A-Za-z]*)?)(\)?){_GAP}_\s*"
    rf"([0-9]+|\\[A-Za-z]+(?:\s*{_IN_BRACES})?|{_IN_BRACES}|[^\s\\{{}}_])"
)
_TEXT_SUBSCRIPT = re.compile(r"_\s*\{\\(?:text|mathrm)\{([^{}]*)\}\}")  # the library loses it: v_{\text{max}}
_FONT = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|sl|tt|up|normal)?|math(?:bf|it|rm|sf|tt|normal)|operatorname|[mh]box|rm|bf|it|sf|tt|"
    r"(?:display|text|script|scriptscript)style)(?![A-Za-z])\s*(?:\{([^{}]*)\})?"
)
_NO_NAME = re.compile(  # of a base: blanks, and the word base
    r"\\(?:left|right|q?quad)(?![A-Za-z])|\\[,;:! ]|[\s~$]|(?<![A-Za-z\\])[Bb]ase(?![A-Za-z])-?"
)
_IN_BRACKETS = re.compile(r"(?:\\?[({\[])*([^(){}\[\],;]*?)(?:\\?[)}\]])*")  # with a comma it is an interval
_WORDS = [
    *("two", "three", "four", "five", "six", "seven", "eight", "nine"),
    *("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen"),
]
_BASES = {word: str(base) for base, word in enumerate(_WORDS, start=2)}
_POWERS_OF_TEN = [  # all, and those that can't be a sum with Euler's e, as 2e-3 can
    re.compile(rf"(?<![\w.^])([0-9]+(?:\.[0-9]+)?|\.[0-9]+)[eE]({sign}[0-9]{{1,3}})(?!\w|\s*[\^(]|\.[0-9]|\)?{_GAP}_)")
    for sign in ("[+-]?", "")
]
_SIGNS = {"<": "lt", ">": "gt", "\u2260": "ne", "\u2264": "le", "\u2265": "ge", "not": "ne"}


class _OutOfTime(BaseException):
    """What is computed takes too long; no Exception, for the library passes over those."""


def math_verify(response: str, answer: str) -> float:
    """Return 1.0 where math-verify finds the response's answer equal to `answer`, else 0.0.

    `answer` is LaTeX or a solution with a \\boxed{...}. Raises ValueError where it is neither, and without the
    library.
    """
    library = _library()
    boxes = filled_boxes(response)
    texts = [_gold(answer), *(boxes if sum(map(len, boxes)) <= 2 * _LONGEST else [])]
    readings = dict.fromkeys(tuple(_read(text, powers) for text in texts) for powers in _POWERS_OF_TEN)
    return float(any(_is_right(library, *reading) for reading in readings))


def library_version() -> str:
    """Return the version of math-verify; its rules change with it. Raises ValueError."""
    _library()
    return metadata.version("math-verify")


def _gold(answer: str) -> str:
    """What the answer of a prompt says. Raises ValueError."""
    gold = last_boxed(answer) if "\\boxed" in answer or "\\fbox" in answer else answer
    if not gold or not gold.strip():
        raise ValueError(f"answer: expected LaTeX or a solution with a closed \\boxed{{...}}, got {answer[-80:]!r}")
    return gold


def _is_right(library: Any, gold: str, *boxes: str) -> bool:
    """Whether the boxes, as a list or each of them, equal the answer. Raises ValueError."""
    golds = _golds(library, gold)
    if not boxes:
        return False
    if _is(library, golds, ", ".join(map(_boxed, boxes))):
        return True
    return len(boxes) > 1 and all(_is(library, golds, _boxed(box)) for box in boxes)  # one answer in several forms


def _golds(library: Any, gold: str) -> Sequence[Any]:
    """What the library reads in an answer, one thing at least. Raises ValueError."""
    try:
        golds = _limited(library.parse, _boxed(gold), parsing_timeout=None)
    except _OutOfTime:
        raise ValueError(
            f"answer: math-verify had not read it after {_SECONDS:g} s of computing, got {gold[-80:]!r}; shorten it"
        ) from None
    if not golds:
        raise ValueError(f"answer: expected LaTeX that math-verify reads, got {gold[-80:]!r}")
    return golds


def _is(library: Any, golds: Sequence[Any], text: str) -> bool:
    """Whether what the library reads in a text equals the answer, which it reads as `golds`."""
    try:
        guess = _limited(library.parse, text, parsing_timeout=None)
    except _OutOfTime:
        return False
    return _sign(golds) == _sign(guess) and any(_equal(library, *pair) for pair in itertools.product(golds, guess))


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


def _read(latex: str, powers: re.Pattern[str]) -> str:
    """The text with numbers and subscripts as the library reads them."""
    plain = TEX_THOUSANDS.sub("", undressed(latex.replace("\N{MINUS SIGN}", "-")))
    plain = _NUMBER_IN_BRACES.sub(r"\1", _TEXT_SUBSCRIPT.sub(r"_{\1}", plain))
    # No blanks: where it can't read the rest, it takes a number behind a blank for the whole.
    return _BASE.sub(_with_factor, powers.sub(r"\\frac{\1\\times10^{\2}}{1}", plain))


def _with_factor(match: re.Match[str]) -> str:
    """A number with its base as a factor, and without it where that is ten; with letters among its digits, a symbol."""
    base = _name(match[3])
    number = match[1].replace(",", "")
    if base in ("", "10"):
        return number + match[2]
    if number.isdigit():
        return rf"{number}{match[2]}\beta_{{{_digits(base)}}}"
    return rf"\nu_{{{_digits(f'{number.upper()}_{base}')}}}{match[2]}"


def _name(subscript: str) -> str:
    """What a subscript says, without the brackets around it, blanks, fonts and the word base: 8 for "{(eight)}"."""
    text = subscript[1:-1] if subscript.startswith("{") else subscript
    text = _NO_NAME.sub("", _FONT.sub(r"\1 ", text))
    text = re.sub(r"\{(\w)\}", r"\1", text)  # b^{2} is b^2
    alone = _IN_BRACKETS.fullmatch(text)
    name = alone[1] if alone else text
    return _BASES.get(name.lower(), name)


def _digits(name: str) -> str:
    """A name, one to one, in what the library takes for a symbol's: a sign in it were lost, and its case."""
    return name.encode("utf-8", "surrogatepass").hex()


def _boxed(latex: str) -> str:
    return f"$\\boxed{{{latex}}}$"


def _library() -> Any:
    """The module math_verify. Raises ValueError."""
    try:
        library = importlib.import_module("math_verify")  # here: optional, and sympy takes a second
    except ImportError as error:
        raise ValueError(
            "reward.name: math_verify needs the package math-verify; install astar-megatron[data], or take the reward "
            "math"
        ) from error
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it says that its own alarm is off
    return library
