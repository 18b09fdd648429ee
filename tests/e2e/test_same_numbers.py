"""Runs compute what they did when numbers.json was written, bit for bit: prompts, responses, losses, weights."""

import json
import os
from pathlib import Path
from typing import Any

import numbers_of_runs as numbers
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
WRITTEN = os.environ.get("ASTAR_NUMBERS_FILE")  # where `python tests/e2e/numbers_of_runs.py` collects them


@pytest.mark.parametrize("case", [*numbers.CASES, "demo"])
def test_a_run_has_the_numbers_it_had(case: str, run_tree: Any, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    known = json.loads(numbers.FILE.read_text(encoding="utf-8")) if numbers.FILE.exists() else {}
    wanted = known.get(numbers.kind_of_machine(), {}).get(case)
    if wanted is None and not WRITTEN:
        pytest.skip(f"numbers.json knows no {numbers.kind_of_machine()}: write it with the version before your change")
    if case == "demo":
        tree = numbers.demo_tree(tmp_path)
    else:
        model, changes = numbers.CASES[case]
        tree = numbers.merged(run_tree(request.getfixturevalue(model)), changes)
        tree = numbers.merged(tree, {"cluster": {"threads": 1}})
    numbers_now = numbers.numbers_of(tree, tmp_path)
    if WRITTEN:
        file = Path(WRITTEN)
        known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        file.write_text(json.dumps(known | {case: numbers_now}), encoding="utf-8")
        return
    assert wanted is not None
    if case == "demo":  # an engine's log-probs depend on what it computes together, which two runs need not share
        del wanted["stage 1"]
        for line in (*wanted["metrics"], *numbers_now["metrics"]):
            del line["engine_gap"]
    for part, value in wanted.items():
        assert numbers_now[part] == value, part
