"""The demo learns in bfloat16, the type that `auto` takes on GPUs and on CPUs that multiply it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from astar_megatron.model.compute_type import native_bfloat16
from astar_megatron.run.tracking import read_metrics

ROOT = Path(__file__).resolve().parents[2]


def test_the_demo_does_not_write_over_prompts_that_are_not_its_own(tmp_path: Path) -> None:
    mine = tmp_path / "mine.jsonl"
    mine.write_text('{"question": "1 + 1", "answer": "2"}\n')
    command = [sys.executable, str(ROOT / "examples" / "quickstart.py"), f"data.path={mine}", "run_dir=run"]
    demo = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ)
    assert demo.returncode == 1 and f"demo: data.path: {mine} holds other prompts" in demo.stderr
    assert mine.read_text() == '{"question": "1 + 1", "answer": "2"}\n'


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not native_bfloat16(), reason="this CPU emulates bfloat16, ten times slower than it multiplies")
def test_the_demo_learns_in_bfloat16(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = [sys.executable, str(ROOT / "examples" / "quickstart.py"), "model.dtype=bfloat16", f"run_dir={run_dir}"]
    subprocess.run(command, cwd=tmp_path, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    steps = read_metrics(str(run_dir))
    assert steps[0]["logratio_max"] == steps[0]["changed_weights"] == 0.0
    assert len(steps) == yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())["train"]["num_steps"]
    assert steps[0]["reward_mean"] < 0.3
    assert steps[-1]["reward_mean"] >= 0.8
    assert steps[1]["changed_weights"] > 0.01
    scores = [json.loads(line) for line in (run_dir / f"eval_step_{len(steps):08d}.jsonl").read_text().splitlines()]
    assert sum(score["reward"] for score in scores) / len(scores) > 0.8
