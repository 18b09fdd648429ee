"""The demo's last screen, of a run folder made here: what training changed, and commands that exist."""

import importlib
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from test_guides import parse

from astar_megatron import config
from astar_megatron.run.tracking import Tracker

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def last_screen(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module("last_screen")


def run_folder(folder: Path) -> Path:
    """A run of three steps, evaluated before and after."""
    tracker = Tracker(folder)
    for step, reward in enumerate((0.125, 0.5, 0.875)):
        evaluation = {} if step else {"eval": 3.0}
        seconds = {"total": 10.0 + step + evaluation.get("eval", 0.0), **evaluation}
        tracker.log({"step": step, "reward_mean": reward, "seconds": seconds})
    for step, rewards in ((0, [1.0, 0.0, 0.0, None]), (2, [0.0, 0.0]), (3, [1.0, 1.0, 0.5, 1.0])):
        rows = [{"sample": "greedy", "reward": reward} for reward in rewards] + [{"sample": 0, "reward": 1.0}]
        (folder / f"eval_step_{step:08d}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_last_screen_shows_before_and_after_and_where_everything_lies(last_screen: Any, tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    rows = dict(last_screen.before_and_after(run, run / "reward.png", run / "hf"))
    assert rows == {
        "right answers, greedy": "1 of 4 (25%) -> 3 of 4 (75%)",
        "mean reward, sampled": "0.12 (step 0) -> 0.88 (step 2)",
        "seconds a step": "11.0",
        "the rewards' curve": f"{run}/reward.png",
        "metrics, a line a step": f"{run}/metrics.jsonl",
        "every answer": f"{run}/eval_step_00000000*.jsonl, {run}/eval_step_00000003*.jsonl",
        "exported model": f"{run}/hf",
    }


def test_the_next_commands_are_of_this_run_and_parse(last_screen: Any) -> None:
    overrides = ["train.num_steps=4", "run_dir=runs/of two words"]
    lines = last_screen.next_commands("configs/demo.yaml", overrides, 4)
    assert len(lines) >= 3
    for line in lines:
        program, *words = shlex.split(line, comments=True)
        assert program == ".venv/bin/astar"
        arguments = parse(words)
        cfg = config.load(ROOT / arguments["config_file"], arguments["overrides"])
        assert cfg.run_dir == "runs/of two words"
        assert cfg.train.num_steps == (8 if words[0] == "train" else 4)
