"""What drawing ahead of training gains, with engines and a policy that sleep as long as real ones would compute.

The source of rollouts and the reward's processes are the real ones.

    .venv/bin/python tests/benchmarks/overlap.py

Engines and policy have cores of their own in a run of this kind; on a machine with a core for each side the real ones
would share what the driver needs too. Seconds a step of `max_staleness` 0, 1 and 4 in one run, the whole time over the
steps: rollouts of the first are hidden by nothing. Writes tests/benchmarks/results/overlap.json.
"""

import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fake_engines import FakeEngines

from astar_megatron.config import RewardConfig, RolloutConfig, SamplingConfig
from astar_megatron.data.prompts import PromptStream
from astar_megatron.rollout.source import RolloutSource
from astar_megatron.rollout.training import TrainingRollouts
from astar_megatron.types import Prompt

RESULTS = Path(__file__).parent / "results" / "overlap.json"
BATCH, STEPS = 64, 12
GENERATE_SECONDS = 1.0  # of a batch
PROMPTS = [Prompt(uid=f"u{i:03}", token_ids=(1, i), text="", answer="55") for i in range(128)]


def run(max_staleness: int, train_seconds: float) -> dict[str, Any]:
    """Return seconds a step and the oldest weights that a batch was begun with."""
    engines = FakeEngines(
        lambda request: ((53, 53), False),
        max_num_seqs=BATCH,
        at_once=8,
        seconds=GENERATE_SECONDS * 8 / BATCH,
        in_order=True,
    )
    oldest, start = 0, time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as folder,
        RolloutSource(engines, SamplingConfig(), RewardConfig(name="last_number"), Path(folder)) as source,
    ):
        rollout = RolloutConfig(max_staleness=max_staleness)
        batches = TrainingRollouts(source, PromptStream(PROMPTS, BATCH, 0), rollout, 0, versions=range(STEPS))
        for version in range(STEPS):
            engines.version = version
            rollouts = batches.take(version, lambda name: contextlib.nullcontext())
            oldest = max(oldest, version - min(rollout.first_version for rollout in rollouts))
            time.sleep(train_seconds)
        seconds = time.perf_counter() - start
    return {"seconds_a_step": round(seconds / STEPS, 3), "staleness_max": oldest}


def main() -> None:
    results: dict[str, Any] = {"generate_seconds": GENERATE_SECONDS, "steps": STEPS, "batch": BATCH}
    for train_seconds in (0.5, 1.0, 2.0):
        of_staleness = {str(k): run(k, train_seconds) for k in (0, 1, 4)}
        at_once = of_staleness["0"]["seconds_a_step"]
        for measured in of_staleness.values():
            measured["gain"] = round(at_once / measured["seconds_a_step"], 2)
        results[f"train_{train_seconds:g}_s"] = of_staleness
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
