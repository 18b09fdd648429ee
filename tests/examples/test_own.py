"""The example with one's own data and reward: its reward on all kinds of text, its data, its configuration."""

import json
from pathlib import Path
from typing import Any

import pytest
import samples

from astar_megatron import config
from astar_megatron.algorithm import rewards

ROOT = Path(__file__).resolve().parents[2]
NAME = "examples.own_reward:total"


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ('{"total": 12}', 1.0),
        ('2 times 6 is {"total": 11}, no: {"total": 12.0}. Done.', 1.0),
        ('{"total": 11}', 0.1),
        ('{"total": 12} {"total": 11}', 0.1),  # the last one counts
        ('{"total": Infinity}', 0.1),
        ("12", 0.0),
        ("", 0.0),
        ('{"total": "12"}', 0.0),
        ('{"total": true}', 0.0),
        ('{"sum": 12}', 0.0),
        ('{"total": 12', 0.0),
        ("{total: 12}", 0.0),
        ('{"total": ' + "9" * 10_000 + "}", 0.0),
        ('{"total": ' + "[" * 100_000 + "}", 0.0),
        ("{" * 100_000, 0.0),
        ('{"total": \x00\ud800}', 0.0),
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
    right = json.dumps({"total": int(rows[0]["answer"])})
    assert rewards.judge(rewards.get(NAME), right, rows[0]["answer"]) == (1.0, "")


def test_it_is_thirty_lines() -> None:
    files = [ROOT / "examples" / name for name in ("own_reward.py", "own.yaml")]
    lines = [line.strip() for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    assert sum(bool(line) and not line.startswith(("#", '"""')) for line in lines) <= 30
