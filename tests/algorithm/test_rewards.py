"""Rewards: tables of tricky strings, linear time, and errors that name the prompt and the response."""

import dataclasses
import json
import math as mathematics
import os
import time
from pathlib import Path

import pytest

from astar_megatron.algorithm import rewards
from astar_megatron.algorithm.rewards.latex import last_boxed, normalised
from astar_megatron.types import Prompt, Rollout

LAST_NUMBER = [
    ("7", "7", 1),
    ("3 + 4 = 7.", "7", 1),
    ("The answer is 7.0", "7", 1),
    ("7.50", "7.5", 1),
    ("first 7, then 8", "7", 0),
    ("It costs $1,234.50!", "1234.5", 1),
    ("It costs $1,234", "$1,234", 1),
    ("-3", "-3", 1),
    ("x = -$3", "-3", 1),
    ("10-7", "7", 1),  # a hyphen between numbers is no sign
    ("\N{MINUS SIGN}3", "-3", 1),
    ("1,2,3", "3", 1),
    ("1,234,567", "1234567", 1),
    ("half is .5", "0.5", 1),
    ("007", "7", 1),
    ("**12**", "12", 1),
    ("12\N{DEGREE SIGN}", "12", 1),
    ("seven", "7", 0),
    ("", "7", 0),
    ("\N{ARABIC-INDIC DIGIT SEVEN}", "7", 0),
    ("1e5", "5", 1),  # documented: no exponents
    ("9" * 50, "9" * 49 + "8", 0),  # not compared as floats
]

GSM8K = [  # response, answer, strict, flexible
    ("so\n#### 42", "42", 1, 1),
    ("so\n#### 42", "long solution 6*7=<<6*7=42>>42\n#### 42", 1, 1),
    ("#### 1,000", "1000", 1, 1),
    ("#### 1000", "#### 1,000", 1, 1),
    ("#### -5", "-5", 1, 1),
    ("The answer is 42.", "42", 0, 1),
    ("#### 42.", "42", 0, 1),
    ("#### $42", "42", 0, 1),
    ("####42", "42", 0, 1),
    ("#### 42 and more 43", "42", 1, 0),
    ("#### 42\nQ: ...\n#### 43", "42", 1, 0),  # the official rule takes the first
    ("42 ... , .", "42", 0, 1),
    ("#### 42.0", "42", 0, 0),
    ("no number, at all.", "42", 0, 0),
    ("", "42", 0, 0),
]

MATH = [
    (r"so \boxed{\frac{1}{2}}", r"\frac{1}{2}", 1),
    (r"so \boxed{\dfrac12}", r"\frac{1}{2}", 1),
    (r"\boxed{\frac1{72}}", r"\tfrac{1}{72}", 1),
    (r"\boxed{1/2}", r"\frac{1}{2}", 1),
    (r"\boxed{0.5}", r"\frac{1}{2}", 1),
    (r"\boxed{.25}", "0.25", 1),
    (r"\boxed{-3/4}", r"\frac{-3}{4}", 1),
    (r"\boxed{1} then \boxed{2}", "2", 1),
    (r"\boxed{1} then \boxed{2}", "1", 0),
    (r"\boxed{\{1,\{2\},3\}}", r"\{1,\{2\},3\}", 1),
    (r"\boxed{\left\{ x \right\}}", r"\{x\}", 1),
    (r"\boxed{\left( 3, \frac{\pi}{2} \right)}", r"(3,\frac{\pi}{2})", 1),
    (r"\boxed{x = 5}", "5", 1),
    (r"\boxed{10\%}", "10", 1),
    (r"\boxed{\$18}", "18", 1),
    (r"\boxed{90^\circ}", "90", 1),
    (r"\boxed{5 \text{ cm}}", "5", 1),
    (r"\boxed{\sqrt3}", r"\sqrt{3}", 1),
    (r"\boxed{\sqrt 3}", r"\sqrt{3}", 1),
    (r"\boxed{\sqrt[3]{2}}", r"\sqrt[3]{2}", 1),
    (r"$\boxed 5$ is it", "5", 1),
    (r"\boxed {5}", "5", 1),
    (r"\fbox{5}", "5", 1),
    (r"\boxed{5", "5", 0),  # not closed
    (r"\boxed{4} \boxed{5", "4", 0),  # the last one counts
    (r"\boxed", "5", 0),
    (r"\boxed{}", "5", 0),
    ("5", "5", 0),
    ("", "5", 0),
    (r"\boxed{5}", r"We get \boxed{1}, no: \boxed{5}.", 1),
    (r"\boxed{\text{Évelyn}}", r"\text{Évelyn}", 1),
    (r"\boxed{1+1}", "2", 0),  # nothing is computed
]


@pytest.mark.parametrize(("response", "answer", "expected"), LAST_NUMBER)
def test_last_number(response: str, answer: str, expected: float) -> None:
    assert rewards.get("last_number")(response, answer) == expected


@pytest.mark.parametrize(("response", "answer", "strict", "flexible"), GSM8K)
def test_gsm8k(response: str, answer: str, strict: float, flexible: float) -> None:
    assert rewards.get("gsm8k_strict")(response, answer) == strict
    assert rewards.get("gsm8k_flexible")(response, answer) == flexible


@pytest.mark.parametrize(("response", "answer", "expected"), MATH)
def test_math(response: str, answer: str, expected: float) -> None:
    assert rewards.get("math")(response, answer) == expected


def test_the_parts_of_math_by_themselves() -> None:
    assert last_boxed(r"a \boxed{x\{y} z") == r"x\{y"
    assert last_boxed("nothing") is None
    assert normalised("k = 3") == "3"
    assert normalised("ab = 3") == "ab=3"


MILLION = 1_000_000
HUGE = {
    "digits": "1" * MILLION,
    "commas": "," * MILLION,
    "groups": "123," * (MILLION // 4),
    "numbers": "7 " * (MILLION // 2),
    "minus": "-" * MILLION,
    "hashes": "#" * MILLION,
    "marks": "#### " * (MILLION // 5),
    "boxes": r"\boxed{" * (MILLION // 7),
    "open": r"\boxed{" + "{" * MILLION,
    "box": r"\boxed{" + "x" * MILLION + "}",
    "fractions": r"\boxed{" + r"\frac12" * (MILLION // 7) + "}",
    "backslashes": r"\boxed{" + "\\" * MILLION + "}",
    "slash": r"\boxed{" + "1" * MILLION + "/" + "2" * MILLION + "}",
    "spaces": r"\boxed" + " " * MILLION,
}


@pytest.mark.parametrize("name", rewards.names())
@pytest.mark.parametrize("text", HUGE.values(), ids=HUGE.keys())
def test_a_response_of_a_megabyte_takes_linear_time(name: str, text: str) -> None:
    start = time.perf_counter()
    assert rewards.get(name)(text, "42") == 0
    assert time.perf_counter() - start < 5  # quadratic time would be hours


def test_thousands_of_responses_are_scored_in_seconds() -> None:
    reward = rewards.get("gsm8k_flexible")
    response = "She makes 9 * 2 = $<<9*2=18>>18 every day. " * 20 + "#### 18"
    start = time.perf_counter()
    assert sum(reward(response, "#### 18") for _ in range(5000)) == 5000
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("name", rewards.names())
def test_an_answer_that_a_reward_cannot_read_is_refused_whatever_the_response(name: str) -> None:
    answer = r"\boxed{5" if name == "math" else "Paris"
    for response in ("", "5", r"\boxed{5}"):
        with pytest.raises(ValueError, match="answer: expected"):
            rewards.get(name)(response, answer)


def _rollout(text: str = "the response", answer: str = "7") -> Rollout:
    prompt = Prompt(uid="u1", token_ids=(1,), text="What is 3 + 4?", answer=answer)
    return Rollout(prompt=prompt, sample=0, seed=0, token_ids=(1,), text=text, truncated=False, logprob=0.0, version=0)


def test_score_sets_rewards_and_nothing_else() -> None:
    right, wrong = rewards.score(rewards.get("last_number"), [_rollout("7"), _rollout("8")])
    assert (right.reward, wrong.reward) == (1.0, 0.0)
    assert dataclasses.replace(right, reward=None) == _rollout("7")


def _raises(response: str, answer: str) -> float:
    raise KeyError("boom")


@pytest.mark.parametrize(
    ("reward", "what"),
    [
        (_raises, "raised KeyError: 'boom'"),
        (lambda response, answer: mathematics.nan, "returned nan"),
        (lambda response, answer: mathematics.inf, "returned inf"),
        (lambda response, answer: "1.0", "returned '1.0'"),
        (lambda response, answer: None, "returned None"),
    ],
)
def test_a_broken_reward_is_named_with_its_prompt_and_response(reward: rewards.Reward, what: str) -> None:
    with pytest.raises(rewards.RewardError) as caught:
        rewards.score(reward, [_rollout("r" * 10_000)])
    message = str(caught.value)
    assert what in message
    assert "What is 3 + 4?" in message and "u1" in message and "test_rewards" in message
    assert "r" * 400 in message and "r" * 501 not in message


def test_check_finds_an_unreadable_answer_before_anything_is_generated() -> None:
    rewards.check(rewards.get("last_number"), [_rollout().prompt])
    with pytest.raises(rewards.RewardError, match="Paris"):
        rewards.check(rewards.get("last_number"), [_rollout(answer="Paris").prompt])


def test_a_reward_is_found_by_name_or_by_import() -> None:
    assert rewards.get("math") is rewards.math
    assert rewards.get("astar_megatron.algorithm.rewards.latex:math") is rewards.math


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gsm8k_strikt", "nearest is gsm8k_strict, all are gsm8k_flexible, gsm8k_strict, last_number, math"),
        ("no_such_package.x:f", "can't import"),
        ("os.path:no_such_function", "can't import"),
        ("os.path:sep", "is str, expected a function"),
        (":f", "can't import"),
    ],
)
def test_an_unknown_reward_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rewards.get(name)


def test_the_version_is_stable_and_follows_the_source() -> None:
    assert rewards.version("gsm8k_strict") == "gsm8k_strict/1"
    imported = rewards.version("astar_megatron.algorithm.rewards.latex:math")
    assert imported.startswith("astar_megatron.algorithm.rewards.latex:math/sha256:")
    assert imported != rewards.version("astar_megatron.algorithm.rewards.latex:normalised")
    with pytest.raises(ValueError, match="no Python source"):
        rewards.version("math:fsum")


def _benchmark(name: str) -> list[dict[str, str]]:
    folder = Path(os.environ.get("ASTAR_DATA") or Path(__file__).parents[3] / "shared" / "data")
    if not (folder / name).is_file():
        pytest.skip(f"{folder / name} is absent; set ASTAR_DATA to the folder of the benchmark files")
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", ["gsm8k_strict", "gsm8k_flexible"])
def test_every_gold_answer_of_gsm8k_scores_one(name: str) -> None:
    reward = rewards.get(name)
    rows = _benchmark("gsm8k_test.jsonl")
    assert len(rows) == 1319
    assert [row["answer"] for row in rows if reward(row["answer"], row["answer"]) != 1] == []


def test_every_gold_answer_of_math500_scores_one() -> None:
    rows = _benchmark("math500.jsonl")
    assert len(rows) == 500
    assert [row["answer"] for row in rows if rewards.math(row["solution"], row["answer"]) != 1] == []
    assert [row["answer"] for row in rows if rewards.math(f"\\boxed{{{row['answer']}}}", row["solution"]) != 1] == []
