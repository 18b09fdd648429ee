"""Rewards whose answer stands between <answer> and </answer>: `countdown`, `multiply` and `arithmetic`.

Graded as in the official code of arXiv 2505.20686, which is TinyZero's: 1.0 right, 0.1 for any other text between the
tags (`countdown`) or any other integer (`multiply`), 0 otherwise; the last pair of tags counts. Expressions are read by
a parser of their own: integers, + - * / and brackets, exact fractions; nothing is evaluated as Python.

Deviations: the official countdown looks for tags in the response's last line only, not over several lines as here; and
powers, `//` and digits other than ASCII's, which it evaluates, are wrong (0.1) here.
"""

import json
import operator
import re
from fractions import Fraction

_OPEN, _CLOSE = "<answer>", "</answer>"
_INTEGER = re.compile(r"\s*([+-]?[0-9]{1,4000})\s*")  # Python refuses to read integers of more than 4300 digits
_TOKEN = re.compile(r"\s*([0-9]+|[-+*/()])")
_LONGEST = 1000  # characters of an expression: sums of a few numbers are far below
_WRONG = 0.1
_TOLERANCE = Fraction(1, 100_000)


def countdown(response: str, answer: str) -> float:
    """Return 1.0 where the tagged expression uses exactly the given numbers and has the target's value within 1e-5.

    0.1 for any other text between the tags, 0 without tags. `answer` is JSON: {"numbers": [3, 7, 5], "target": 26}.
    """
    numbers, target = _problem(answer)
    text = tagged(response)
    if text is None:
        return 0.0
    used = _parse(text)
    if used is None:
        return _WRONG
    integers, value = used
    right = value is not None and abs(value - target) < _TOLERANCE and sorted(integers) == numbers
    return 1.0 if right else _WRONG


def multiply(response: str, answer: str) -> float:
    """Return 1.0 where the tagged integer is `answer`, 0.1 for another integer, 0 without one."""
    gold = _INTEGER.fullmatch(answer)
    if gold is None:
        raise ValueError(f"answer: expected an integer, got {answer[:80]!r}")
    integer = tagged_integer(response)
    if integer is None:
        return 0.0
    return 1.0 if int(integer) == int(gold[1]) else _WRONG


def tagged_value(response: str) -> str | None:
    """Return what `countdown` compares: the value of the tagged expression and its numbers; None where it is none."""
    text = tagged(response)
    used = _parse(text) if text is not None else None
    if used is None:
        return None
    integers, value = used
    return f"{'nothing' if value is None else value} of {', '.join(map(str, sorted(integers)))}"


def tagged_integer(response: str) -> str | None:
    """Return what `multiply` compares: the tagged integer; None without one."""
    text = tagged(response)
    match = _INTEGER.fullmatch(text) if text is not None else None
    return str(int(match[1])) if match is not None else None


def tagged(response: str) -> str | None:
    """Return what the last <answer>...</answer> of `response` holds, stripped; None where there is none."""
    end = response.rfind(_CLOSE)
    start = response.rfind(_OPEN, 0, max(end, 0))
    return response[start + len(_OPEN) : end].strip() if start >= 0 else None


def _problem(answer: str) -> tuple[list[int], int]:
    try:
        problem = json.loads(answer)
        numbers, target = problem["numbers"], problem["target"]
        whole = all(type(number) is int and number >= 0 for number in numbers) and type(target) is int
    except (ValueError, KeyError, TypeError):
        whole, numbers, target = False, [], 0
    if not whole or not numbers:
        raise ValueError(f'answer: expected JSON like {{"numbers": [3, 7, 5], "target": 26}}, got {answer[:80]!r}')
    return sorted(numbers), target


def _parse(text: str) -> tuple[list[int], Fraction | None] | None:
    """The integers of an expression and its value (None: it divides by zero); None where it is no expression."""
    if len(text) > _LONGEST:
        return None
    tokens, position = [], 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            return None
        tokens.append(match[1])
        position = match.end()
    ordered = _postfix(tokens)
    if ordered is None:
        return None
    return [int(token) for token in tokens if token[0].isdigit()], _value(ordered)


_OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
_PRIORITY = {"+": 1, "-": 1, "*": 2, "/": 2, "negative": 3, "positive": 3}


def _postfix(tokens: list[str]) -> list[str] | None:
    """The tokens in postfix order (Dijkstra's shunting yard); None where they are no expression."""
    ordered: list[str] = []
    waiting: list[str] = []
    value_expected = True
    for token in tokens:
        if token[0].isdigit():
            if not value_expected:
                return None
            ordered.append(token)
            value_expected = False
        elif token == "(":
            if not value_expected:
                return None
            waiting.append(token)
        elif token == ")":
            if value_expected:
                return None
            while waiting and waiting[-1] != "(":
                ordered.append(waiting.pop())
            if not waiting:
                return None
            waiting.pop()
        elif value_expected:
            if token not in "+-":
                return None
            waiting.append({"+": "positive", "-": "negative"}[token])
        else:
            while waiting and waiting[-1] != "(" and _PRIORITY[waiting[-1]] >= _PRIORITY[token]:
                ordered.append(waiting.pop())
            waiting.append(token)
            value_expected = True
    return None if value_expected or "(" in waiting else [*ordered, *reversed(waiting)]


def _value(ordered: list[str]) -> Fraction | None:
    stack: list[Fraction] = []
    for token in ordered:
        if token[0].isdigit():
            stack.append(Fraction(int(token)))
        elif token == "negative":
            stack.append(-stack.pop())
        elif token != "positive":
            right, left = stack.pop(), stack.pop()
            if token == "/" and right == 0:
                return None
            stack.append(_OPERATORS[token](left, right))
    (value,) = stack
    return value
