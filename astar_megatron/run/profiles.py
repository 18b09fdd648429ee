"""Which steps are profiled, and what is said of the traces: `<run_dir>/profiles/step_<n>_rank_<r>.json.gz`.

Each Megatron rank runs its part of the step under torch's profiler and writes a trace. Driver and engines are left out.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from astar_megatron.types import Trace

FOLDER = "profiles"


class Profiled(Protocol):
    """The policy, as far as profiles ask it."""

    def begin_profile(self) -> None: ...

    def end_profile(self, folder: Path, step: int) -> list[Trace]: ...


@contextmanager
def profiled(
    step: int, steps: Collection[int], policy: Profiled, run_dir: Path, say: Callable[[str], None]
) -> Iterator[None]:
    """Profile the policy in the body if `step` is one of `steps`, and say what came of it.

    A trace that can't be written is said too, and ends nothing. A step that is taken again overwrites its traces.
    """
    if step not in steps:
        yield
        return
    policy.begin_profile()
    yield
    say(words(step, policy.end_profile(run_dir / FOLDER, step), run_dir / FOLDER))


def words(step: int, traces: Sequence[Trace], folder: Path) -> str:
    """Return what was written of a step, with bytes, and the first of the problems."""
    written = [trace for trace in traces if not trace.problem]
    num_bytes = sum(trace.num_bytes for trace in written)
    text = f"step {step}: traces of {len(written)} of {len(traces)} ranks in {folder} ({num_bytes / 1e6:,.1f} MB)"
    problems = [trace.problem for trace in traces if trace.problem]
    return f"{text}; the others were not written, and training goes on: {problems[0]}" if problems else text
