"""A run whose engines draw ahead of training, killed: what it trains on, with the real stack."""

import signal
from pathlib import Path
from typing import Any

import pytest
from driver_process import driver
from random_kills import numbers_of, write_run

from astar_megatron.run.tracking import read_metrics


@pytest.mark.slow
@pytest.mark.timeout(1800)  # four programs
def test_a_killed_run_that_draws_ahead_loses_no_prompt_and_trains_on_none_twice(
    tied_llama: Path, tmp_path: Path
) -> None:
    """SIGKILL after steps 3 and 6 of 8. Which weights drew a response may differ, what it was asked for not."""
    ahead: dict[str, Any] = {
        "objective": {"name": "oapl"},
        "oapl": {"group_size": 3},
        "rollout": {"max_staleness": 2},
        "checkpoint": {"interval": 1},
    }
    for name, kills in (("whole", ()), ("killed", (3, 6))):
        file = write_run(tmp_path, tied_llama, name, **ahead)
        for steps in kills:
            with driver("train", "--config", str(file)) as process:
                process.wait_for(lambda output, file=file, steps=steps: len(steps_of(file)) >= steps)
                assert process.end(signal.SIGKILL) == -signal.SIGKILL
        with driver("train", "--config", str(file)) as process:
            assert process.wait() == 0, process.output()
    whole, killed = (asked_for(tmp_path / name) for name in ("whole", "killed"))
    assert len(whole) == 8 and killed == whole
    lines = read_metrics(tmp_path / "killed")
    assert [line["step"] for line in lines] == list(range(8)) and max(line["staleness_max"] for line in lines) > 0


def steps_of(file: Path) -> list[dict[str, Any]]:
    return read_metrics(file.with_suffix(""))


def asked_for(run: Path) -> dict[str, list[tuple[str, int, int]]]:
    """By step, the prompt, sample and seed of each response that it was trained on."""
    return {
        name: sorted((row["uid"], row["sample"], row["seed"]) for row in rows)
        for name, rows in numbers_of(run)["rollouts"].items()
    }
