"""The example with one's own data and reward: its reward on all kinds of text, its data, its configuration."""

from pathlib import Path
from typing import Any

import pytest
import samples

from astar_megatron import config
from astar_megatron.algorithm import rewards

ROOT = Path(__file__).resolve().parents[2]
NAME = "examples.own_reward:equation"


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("5 + 7 = 12", 1.0),
        ("5 + 7 = 13, no: **5 + 7 = 12**. Done.", 1.0),
        ("6 + 6 = 12", 1.0),  # it does not see the question
        ("5 + 7 = 13", 0.1),
        ("5 + 8 = 12", 0.1),  # the answer of an equation that is false
        ("5 + 8 = 13", 0.1),  # true, and another problem's
        ("5 + 7 = 12, and 5 + 7 = 11", 0.1),  # the last one counts
        ("12", 0.0),
        ("", 0.0),
        ("5 + 7 =", 0.0),
        ("5 - -7 = 12", 0.0),
        ("5 + 7 = " + "9" * 10_000, 0.1),
        ("9" * 100_000 + " + ", 0.0),
        ("5 + " * 100_000, 0.0),
        ("\u0665 + \u0667 = \x00\ud800", 0.0),
    ],
)
def test_its_reward_is_right_on_right_wrong_and_hostile_responses(
    response: str, reward: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert rewards.judge(rewards.get(NAME), response, "12") == (reward, "")


def test_its_data_is_accepted_and_its_configuration_loads(
    astar: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    out, source = tmp_path / "own.jsonl", ROOT / "examples/own_problems.jsonl"
    status, words, error = astar("data", "jsonl", source, "--out", out, "--reward", NAME)
    assert (status, error) == (0, "") and f"reward.name: {NAME}" in words
    rows = samples.read_jsonl(out)
    cfg = config.load(ROOT / "examples/own.yaml")
    assert cfg.reward.name == NAME and len(rows) == cfg.train.batch_size
    assert rows == samples.read_jsonl(source)
    right = f"0 + {rows[0]['answer']} = {rows[0]['answer']}"
    assert rewards.judge(rewards.get(NAME), right, rows[0]["answer"]) == (1.0, "")


def test_it_is_thirty_lines() -> None:
    files = [ROOT / "examples" / name for name in ("own_reward.py", "own.yaml")]
    lines = [line.strip() for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    assert sum(bool(line) and not line.startswith(("#", '"""')) for line in lines) <= 30
