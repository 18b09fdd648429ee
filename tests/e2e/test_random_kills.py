"""Whatever is killed at whatever moment, a run ends with the numbers that it would have had (real stack)."""

from pathlib import Path

import pytest
import samples
from random_kills import LAYOUTS, summary_of


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
