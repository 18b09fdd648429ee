"""`astar compare` with the real stack, ended in the middle and run again (tests/test_compare.py has one by hand)."""

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from astar_megatron.cluster.signals import RESUME
from astar_megatron.run.tracking import read_metrics

BUDGET = 330  # response tokens: stage 1 takes up to 216, a step up to 108


@pytest.mark.slow
def test_two_methods_reach_the_budget_with_two_seeds_although_the_comparison_was_ended(
    run_tree: Any, tied_llama: Path, tmp_path: Path
) -> None:
    tree = run_tree(tied_llama) | {"checkpoint": {"interval": 1}, "eval": {"max_prompts": 5}}
    tree["train"] |= {"num_steps": 8, "batch_size": 12, "mini_batch_size": 6}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    folder = Path(tree["run_dir"]) / "compare"

    def compare(until_lines_of: str = "") -> int:
        command = [sys.executable, "-m", "astar_megatron.cli", "compare", "--config", str(tmp_path / "run.yaml")]
        command += ["--methods", "astar,rebel", "--budget", f"tokens={BUDGET}", "--seeds", "0,1"]
        with subprocess.Popen(command, cwd=Path(__file__).parent, start_new_session=True) as process:
            while process.poll() is None:
                if until_lines_of and read_metrics(folder / until_lines_of):
                    process.send_signal(signal.SIGTERM)
                    until_lines_of = ""
                time.sleep(0.05)
        return process.returncode

    assert compare("rebel-0") == RESUME
    begun = [run["state"] for run in json.loads((folder / "compare.json").read_text())["runs"]]
    assert begun == ["finished", "finished", "waiting", "waiting"]
    assert compare() == 0
    results = json.loads((folder / "compare.json").read_text())
    stage_1 = results["stage_1"]["astar"]
    assert set(results["stage_1"]) == {"astar"} and stage_1["tokens"] > 0 and stage_1["seconds"] > 0
    assert results["ended_by_num_steps"] == []
    rows = list(csv.DictReader((folder / "compare.csv").open()))
    assert [run["name"] for run in results["runs"]] == ["astar-0", "astar-1", "rebel-0", "rebel-1"]
    for run in results["runs"]:
        lines = read_metrics(folder / run["name"])
        before = stage_1["tokens"] if run["method"] == "astar" else 0
        assert lines[-1]["spent_tokens"] == run["spent"]["tokens"] >= BUDGET  # the run counts as the comparison does
        assert run["spent"]["tokens"] - lines[-1]["response_tokens"] < BUDGET
        assert run["spent"]["tokens"] == before + sum(line["response_tokens"] for line in lines)
        assert len([row for row in rows if (row["method"], row["seed"]) == (run["method"], str(run["seed"]))]) == len(
            lines
        )
        assert all(line["model_flops"] > line["generation_flops"] > 0 for line in lines)
        assert (folder / run["name"] / f"eval_step_{len(lines):08d}.jsonl").exists() and 0 <= run["score"] <= 1
        assert (folder / run["name"] / "hf" / "model.safetensors").exists()
    assert (folder / "compare.png").stat().st_size > 10_000
    again = time.monotonic()
    assert compare() == 0 and time.monotonic() - again < 60  # nothing is run
    assert json.loads((folder / "compare.json").read_text()) == results
