"""That the driver's work grows no faster than the ranks and engines, counted in lines of code that run, not in seconds.

tests/benchmarks/scale.py measures the seconds and writes slurm/SCALE.md.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))

import scale  # noqa: E402  # pyright: ignore[reportMissingImports]
import scale_driver  # noqa: E402  # pyright: ignore[reportMissingImports]
from scale_models import SIZES, model_named  # noqa: E402  # pyright: ignore[reportMissingImports]

from conversion.plan import plan  # noqa: E402

_OURS = tuple(str(ROOT / folder) for folder in ("astar_megatron", "conversion"))
_TOOL = sys.monitoring.PROFILER_ID


@pytest.fixture
def count() -> Iterator[Callable[[Callable[[], Any]], float]]:
    """Return a function that says how many lines of ours a call runs, in all threads."""
    lines = 0

    def line(code: CodeType, _: int) -> object:
        nonlocal lines
        if not code.co_filename.startswith(_OURS):
            return sys.monitoring.DISABLE
        lines += 1
        return None

    def counted(call: Callable[[], Any]) -> float:
        before = lines
        call()
        return lines - before

    sys.monitoring.use_tool_id(_TOOL, "lines")
    sys.monitoring.register_callback(_TOOL, sys.monitoring.events.LINE, line)
    sys.monitoring.set_events(_TOOL, sys.monitoring.events.LINE)
    yield counted
    sys.monitoring.set_events(_TOOL, 0)
    sys.monitoring.free_tool_id(_TOOL)


def test_the_work_of_a_step_and_of_the_start_grows_no_faster_than_ranks_and_engines(count: Any) -> None:
    small, large = (scale_driver.measured(ranks, count) for ranks in (512, 1024))
    for before, after in zip(small, large, strict=True):
        assert before.keys() == after.keys() and all(lines > 0 for lines in before.values())
        grown = {part: after[part] / before[part] for part in before if after[part] > 2.2 * before[part]}
        assert set(grown) <= {"place"}, grown  # once a run: nodes times engines


def test_a_publish_asks_each_engine_twice_and_only_the_ranks_that_send() -> None:
    _, cluster = scale_driver.placing(1024, lambda call: bool(call()))
    scale_driver.publishing(1024, cluster, lambda call: bool(call()))
    senders, engines = len(cluster.digests), scale_driver.num_engines(1024)
    assert 8 <= senders <= 8 * 64  # of each cell of 4 x 2 the first 64 replicas
    assert {name: cluster.asked[name] / scale_driver.STEPS for name in ("publish", "digests", "update", "audit")} == {
        "publish": senders,
        "digests": senders,
        "update": engines,
        "audit": engines,
    }


def test_a_plan_is_as_large_for_8192_ranks_as_for_2048() -> None:
    for name, spread in SIZES.items():
        if spread.expert > 1:
            continue  # as the others, in a minute
        model, sizes = model_named(name), []
        for layout in (spread.layout(2048), spread.layout(8192)):
            tiles = model.megatron_tiles(layout, layout.senders())
            sizes.append((len(tiles), len(plan(tiles, model.vllm_tiles(spread.workers)).copies)))
        assert sizes[0] == sizes[1], name


def test_the_page_is_made_of_what_was_measured() -> None:
    text, results = scale.PAGE.read_text(encoding="utf-8"), json.loads(scale.RESULTS.read_text(encoding="utf-8"))
    assert scale.page(text, results) == text, "slurm/SCALE.md: run tests/benchmarks/scale.py --page"
