"""`astar scale run` and `fit` with the real stack (tests/test_scaling.py has a study with an `astar` made by hand)."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import samples
import yaml

from astar_megatron.run.tracking import read_metrics

BUDGETS = (300, 420, 560)  # response tokens: stage 1 takes up to 216, a step up to 108


def astar(*words: object) -> str:
    command = [sys.executable, "-m", "astar_megatron.cli", *map(str, words)]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_each_run_of_a_study_is_evaluated_once_it_has_cost_each_budget_and_the_fit_reads_it(
    run_tree: Any, tied_llama: Path, tmp_path: Path
) -> None:
    tree = run_tree(tied_llama)
    held_out = [{"question": f"What is {a} + 7?", "answer": str(a + 7)} for a in range(3)]
    tree["data"]["eval_path"] = str(samples.write_jsonl(tmp_path / "held_out.jsonl", held_out))
    tree["train"] |= {"num_steps": 50, "batch_size": 12, "mini_batch_size": 6}
    del tree["eval"]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    study = {
        "config": str(tmp_path / "run.yaml"),
        "grid": [{"objective.name": ["astar", "rebel"]}],
        "budgets": [f"tokens={budget}" for budget in BUDGETS],
        "seeds": [3],
        "out": str(tmp_path / "out"),
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    astar("scale", "run", tmp_path / "study.yaml")
    cells = json.loads((tmp_path / "out" / "scale.json").read_text())["cells"]
    for name, cell in cells.items():
        lines, before = read_metrics(tmp_path / "out" / f"{name}-3"), (cell["stage_1"] or {}).get("tokens", 0)
        spent = [before]
        for line in lines:
            spent.append(spent[-1] + line["response_tokens"])
        due = [next(step for step, tokens in enumerate(spent) if tokens >= budget) for budget in BUDGETS]
        evaluated = sorted(int(file.stem[-8:]) for file in (tmp_path / "out" / f"{name}-3").glob("eval_step_*.jsonl"))
        assert evaluated == [0, *due] and len(lines) == due[-1]
        assert [score["steps"] for score in cell["runs"]["3"]["scores"]] == evaluated
    assert (cells["name=astar"]["stage_1"] is None, cells["name=rebel"]["stage_1"]) == (False, None)
    rows = list(csv.DictReader((tmp_path / "out" / "scale.csv").open()))
    assert len([row for row in rows if row["score"]]) == 2 * (1 + len(BUDGETS))
    written = (tmp_path / "out" / "scale.json").read_text()
    assert "run 1 of" not in astar("scale", "run", tmp_path / "study.yaml")  # nothing is left
    assert (tmp_path / "out" / "scale.json").read_text() == written
    astar("scale", "fit", tmp_path / "out", "--score", "score", "--out", tmp_path / "fit")
    assert (tmp_path / "fit" / "fit.png").exists()
