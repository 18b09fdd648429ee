"""Whatever is killed at whatever moment, a run ends with the numbers that it would have had (real stack)."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import samples
from random_kills import LAYOUTS, Attempt, Pace, ends_before_a_moment, phase_of, summary_of

PACE = Pace(whole=0.0, step=0.0, parts={})


def attempt_that(run: Path, *numbers_of_lines: int) -> Attempt:
    """A run that has these numbers of lines of metrics, one after the other as it is looked at, and then ends."""
    left = list(numbers_of_lines)
    process = SimpleNamespace(poll=lambda: None if left else 0)

    def look() -> set[int]:
        lines = "".join(json.dumps({"step": step}) + "\n" for step in range(left.pop(0)))
        (run / "metrics.jsonl").write_text(lines)
        return set()

    return cast(Attempt, SimpleNamespace(process=process, look=look))


def draws(steps: int) -> Any:
    """A random source that draws so many steps, and no seconds."""
    return SimpleNamespace(choice=lambda _: steps, uniform=lambda low, _: low)


def test_a_kill_waits_for_its_step_from_where_steps_are_taken_again(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    attempt = attempt_that(tmp_path, 5, 5, 2, 3, 4, 5, 6)
    attempt.look()
    assert not ends_before_a_moment(attempt, tmp_path, PACE, draws(2))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4  # two more than the two it fell back to


def test_a_run_that_ends_before_the_moment_is_not_waited_for(tmp_path: Path) -> None:
    attempt = attempt_that(tmp_path, 0, 1, 1)
    assert ends_before_a_moment(attempt, tmp_path, PACE, draws(2))
    assert not ends_before_a_moment(attempt_that(tmp_path, 0), tmp_path, PACE, draws(0))


def test_the_phase_is_that_of_the_policys_last_start(tmp_path: Path) -> None:
    output, phases = "starting\n", []
    for line in (
        "weights go to the engines by shared memory",
        "rank 0 died; training goes on from the newest checkpoint",
        "starting the policy again: 15 s",
        "starting the policy again: 16.2 s",
        "eval_step_00000003, prompts, greedy: 5 in 0.1 s",
        "rank 1 died; training goes on from the newest checkpoint",
    ):
        phases.append(phase_of(tmp_path, output, 1.0))
        output += f"{line}\n"
    phases.append(phase_of(tmp_path, output, 1.0))
    assert phases == ["start", "step", "policy's start", "policy's start", "step", "evaluation", "policy's start"]


def test_the_pace_is_the_mean_of_all_steps(tmp_path: Path) -> None:
    lines = [{"step": 0, "seconds": {"total": 3.0, "publish": 1.0, "eval": 1.0}}]
    lines += [{"step": 1, "seconds": {"total": 2.0, "publish": 0.5}}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pace = Pace.of(tmp_path, 60.0)
    assert (pace.whole, pace.step, pace.parts) == (60.0, 2.5, {"eval": 0.5, "publish": 0.75, "total": 2.5})


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_five_kills_at_random_moments_change_no_number_and_lose_no_prompt(
    layout: str, tied_llama: Path, tmp_path: Path
) -> None:
    summary = summary_of(layout, tied_llama, tmp_path, num_kills=5, seed=2)
    samples.keep_result("random_kills", layout, summary)
    assert summary["kills"] == 5
    assert (summary["differing"], summary["lost_prompts"], summary["prompts_twice"]) == (0, 0, 0), summary
