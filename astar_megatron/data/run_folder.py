"""Names in a run_dir that more than one room uses; a step's have its number in eight digits, so they sort by it."""

import re

BAD_BATCHES = "bad_batches"
STEPS = "step_" + 8 * "[0-9]"  # a pattern of `step_name`


def step_name(step: int) -> str:
    """Return what the name of a file or folder of a step begins with."""
    return f"step_{step:08d}"


def step_of(name: str) -> int:
    """Return the step of a name that has `step_name` in it."""
    match = re.search(STEPS, name)
    assert match is not None, name
    return int(match[0].removeprefix("step_"))
