"""Problems made from a seed: the same everywhere, no two alike, solvable, and readable by their reward."""

import hashlib
import itertools
import json
import re
from collections.abc import Callable
from fractions import Fraction

import pytest

from astar_megatron.algorithm import rewards
from astar_megatron.data.arithmetic import arithmetic, countdown, distinct, jsonl, multiply
from astar_megatron.data.rows import PromptError

MADE: dict[str, Callable[[int, int], list[dict[str, str]]]] = {
    "arithmetic": arithmetic,
    "countdown": countdown,
    "multiply": multiply,
}


@pytest.mark.parametrize(
    ("kind", "digest"), [("arithmetic", "9b00668f"), ("countdown", "8caa4d8b"), ("multiply", "9e01ef61")]
)
def test_a_seed_gives_the_same_problems_everywhere(kind: str, digest: str) -> None:
    made = MADE[kind](50, 3)
    assert hashlib.sha256(jsonl(made)).hexdigest()[:8] == digest
    assert made == MADE[kind](60, 3)[:50] != MADE[kind](50, 4)


@pytest.mark.parametrize("kind", MADE)
def test_no_problem_comes_twice_and_its_reward_reads_each(kind: str) -> None:
    made = MADE[kind](400, 0)
    assert len({row["question"] for row in made}) == 400
    for row in made:
        value = rewards.get(kind)("<answer>0</answer>", row["answer"])
        assert value == (1.0 if row["answer"] == "0" else 0.1)


def test_sums_and_products_have_their_value() -> None:
    for row in arithmetic(300, 1):
        question = re.search(r"is (.*)\?", row["question"])
        assert question is not None
        countdown_answer = json.dumps(
            {"numbers": [int(n) for n in re.findall("[0-9]+", question[1])], "target": int(row["answer"])}
        )
        assert rewards.get("countdown")(f"<answer>{question[1]}</answer>", countdown_answer) == 1.0
    for row in multiply(50, 1):
        a, b = map(int, re.findall("[0-9]+", row["question"])[:2])
        assert (str(a * b), 100 <= a <= 999, 100 <= b <= 999) == (row["answer"], True, True)


def _values(numbers: list[Fraction]) -> set[Fraction]:
    """All values of expressions that use each number once."""
    if len(numbers) == 1:
        return {numbers[0]}
    values: set[Fraction] = set()
    for i, j in itertools.combinations(range(len(numbers)), 2):
        a, b = numbers[i], numbers[j]
        rest = [number for k, number in enumerate(numbers) if k not in (i, j)]
        for value in {a + b, a - b, b - a, a * b, *([a / b] if b else []), *([b / a] if a else [])}:
            values |= _values([*rest, value])
    return values


def test_every_countdown_problem_has_a_solution() -> None:
    for row in countdown(12, 2):
        problem = json.loads(row["answer"])
        assert problem["target"] in _values([Fraction(number) for number in problem["numbers"]])
        assert 10 <= problem["target"] <= 99
        assert row["question"].startswith(
            f"Using the numbers {', '.join(map(str, problem['numbers']))}, make an expression that equals "
        )


def test_a_kind_of_problem_that_is_used_up_is_an_error() -> None:
    with pytest.raises(PromptError, match="coin: only 2 different problems found, 3 wanted"):
        distinct(lambda dice: {"question": str(dice.roll(0, 1))}, 3, 0, "coin")
