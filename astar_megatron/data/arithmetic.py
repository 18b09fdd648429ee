"""Problems that the project makes itself, so that they need no download: additions, arithmetic, products, countdown.

The same seed gives the same problems everywhere, whatever the Python; no problem comes twice.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from pathlib import Path

from astar_megatron.data.files import make_folder, write_atomic
from astar_megatron.data.rows import PromptError

type Question = dict[str, str]  # question, answer

_TAGS = "Think step by step and give the final answer between <answer> and </answer>, for example <answer>12</answer>."
_COUNTDOWN = (
    "Using the numbers {numbers}, make an expression that equals {target}. You may use + - * / and brackets, and each "
    "number exactly once. Think step by step and give the expression between <answer> and </answer>, for example "
    "<answer>(1 + 2) / 3</answer>."
)
_TRIES = 20_000  # draws without a new problem before the problems count as used up


def one_digit_additions() -> list[Question]:
    """Return the 64 additions of 2..9 and 2..9."""
    return [
        {"question": f"What is {a} + {b}? Answer with just the number.", "answer": str(a + b)}
        for a in range(2, 10)
        for b in range(2, 10)
    ]


def arithmetic(count: int, seed: int) -> list[Question]:
    """Return `count` sums, differences and products of three numbers from 1 to 99, for the reward `arithmetic`."""

    def draw(dice: "_Dice") -> Question:
        a, b, c = (dice.roll(1, 99) for _ in range(3))
        first, second = (dice.roll(0, 2) for _ in range(2))
        signs = "+-*"[first], "+-*"[second]
        values: dict[str, Callable[[int, int], int]] = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
        if signs[1] == "*" and signs[0] != "*":  # products first
            value = values[signs[0]](a, b * c)
        else:
            value = values[signs[1]](values[signs[0]](a, b), c)
        return {"question": f"What is {a} {signs[0]} {b} {signs[1]} {c}? {_TAGS}", "answer": str(value)}

    return distinct(draw, count, seed, "arithmetic")


def multiply(count: int, seed: int) -> list[Question]:
    """Return `count` products of two numbers of three digits, for the reward `multiply`."""

    def draw(dice: "_Dice") -> Question:
        a, b = dice.roll(100, 999), dice.roll(100, 999)
        return {"question": f"What is {a} * {b}? {_TAGS}", "answer": str(a * b)}

    return distinct(draw, count, seed, "multiply")


def countdown(count: int, seed: int) -> list[Question]:
    """Return `count` countdown problems for the reward of that name: three or four numbers up to 99, a target to 99.

    Each has a solution: the target is what a random expression of the numbers gives.
    """

    def draw(dice: "_Dice") -> Question | None:
        numbers = [dice.roll(1, 99) for _ in range(dice.roll(3, 4))]
        target = _combined(dice, numbers)
        if target.denominator != 1 or not 10 <= target <= 99:
            return None
        question = _COUNTDOWN.format(numbers=", ".join(map(str, numbers)), target=target)
        return {"question": question, "answer": json.dumps({"numbers": numbers, "target": int(target)})}

    return distinct(draw, count, seed, "countdown")


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, str]]) -> None:
    """Write `rows` to `path`, or where it is a link to, one JSON object a line, whole or not at all: StorageError."""
    make_folder(Path(os.path.realpath(path)).parent)
    write_atomic(path, jsonl(rows))


def jsonl(rows: Iterable[Mapping[str, str]]) -> bytes:
    """Return `rows` as the bytes of a JSONL file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8")


def _combined(dice: "_Dice", numbers: list[int]) -> Fraction:
    """The value of a random expression that uses each number once."""
    values = [Fraction(number) for number in numbers]
    while len(values) > 1:
        right, left = (values.pop(dice.roll(0, len(values) - 1)) for _ in range(2))
        sign = dice.roll(0, 3 if right else 2)
        values.append((left + right, left - right, left * right, left / (right or 1))[sign])
    return values[0]


def distinct(draw: "Callable[[_Dice], Question | None]", count: int, seed: int, name: str) -> list[Question]:
    """Return `count` different problems that `draw` makes of random numbers. Raises PromptError if there are less."""
    dice = _Dice(f"{name}:{seed}")
    problems: dict[str, Question] = {}
    tries = 0
    while len(problems) < count:
        problem = draw(dice)
        if problem is not None and problem["question"] not in problems:
            problems[problem["question"]] = problem
            tries = 0
        elif (tries := tries + 1) > _TRIES:
            raise PromptError(f"{name}: only {len(problems)} different problems found, {count} wanted; ask for fewer")
    return list(problems.values())


class _Dice:
    """Numbers from a digest of the seed and a counter: a library's new version must not change a data set."""

    def __init__(self, seed: str) -> None:
        self._seed, self._count = seed, 0

    def roll(self, lowest: int, highest: int) -> int:
        digest = hashlib.blake2b(f"{self._seed}:{self._count}".encode(), digest_size=8).digest()
        self._count += 1
        return lowest + int.from_bytes(digest, "big") % (highest - lowest + 1)  # of 64 bits: even to one in 10^17
