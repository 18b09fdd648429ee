"""PROGRAM: a run as one HTML page, to look at in any browser: curves, health, timelines and rollouts."""

from pathlib import Path

from astar_megatron.data.files import write_atomic
from astar_megatron.pages.page import is_page, page_of
from astar_megatron.run.tracking import METRICS_FILE, PLACEMENT_FILE, Screen, read_metrics

PAGE_FILE = "show.html"


def main(run_dir: Path, out: Path | None) -> None:
    """Write the page of a run to `out` (default: `<run_dir>/show.html`); of one that goes on, as it is now.

    Raises ValueError for a folder that is no run, for files of it that are damaged, and where the page would take the
    place of something else.
    """
    if not any((run_dir / name).is_file() for name in (METRICS_FILE, PLACEMENT_FILE)):
        raise ValueError(
            f"RUN: {run_dir} is no folder of a run, it has no {METRICS_FILE}; name the run_dir of an `astar train`"
        )
    file = out or run_dir / PAGE_FILE
    if file.exists() and not is_page(file):
        raise ValueError(
            f"{file} is there and is no page of `astar show`, which would take its place; name another file by --out"
        )
    page = page_of(run_dir, read_metrics(run_dir))
    text = page.text.encode(errors="replace")
    write_atomic(file, text)
    left = page.all_rollouts - page.rollouts
    rollouts = f"{page.rollouts} rollouts" + f", {left} more are left out" * bool(left)
    Screen().say(f"{file}: {page.steps} steps, {rollouts}; {len(text) / 1e6:.1f} MB, open it in a browser")
