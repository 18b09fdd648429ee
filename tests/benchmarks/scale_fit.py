"""What `astar scale fit` takes with the search of studies/laws.py as it is and as it was, in turns of one run.

    git show COMMIT:astar_megatron/studies/laws.py > laws_before.py
    OMP_NUM_THREADS=1 python tests/benchmarks/scale_fit.py --before laws_before.py [--turns 3] [--out FILE]

A curve is a sigmoid with noise, of one run or three. Seconds are those of the CPU, the median over the turns; a ratio
is before over now. `largest_difference` is that of any number of fit.json, relative to it, and `where` which that is; a
number that is there for one alone would be infinite.
"""

import argparse
import importlib.util
import json
import math
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from astar_megatron.studies import laws
from astar_megatron.studies.extrapolation import extrapolate
from astar_megatron.studies.extrapolation_files import as_json
from astar_megatron.studies.laws import Points
from astar_megatron.studies.score_curves import Curve

CURVES = {"25 points": (1, 25), "60 points": (1, 60), "120 points": (3, 40)}
CURVES |= {"239 points": (1, 239), "400 points": (1, 400), "3,000 points": (3, 1000)}
TOLERANCE = 0.02


def curve_of(runs: int, steps: int) -> Curve:
    compute = np.tile(np.linspace(1.0, 0.0, steps, endpoint=False)[::-1], runs)
    noise = np.random.default_rng(0).normal(0, 0.02, compute.size)
    points = Points(1e15 * compute, 0.1 + 0.7 / (1 + (0.2 / compute) ** 1.5) + noise, np.repeat(np.arange(runs), steps))
    return Curve(name="sigmoid", compute="spent_flops", score="score", points=points, asked_runs=runs)


def fitted(curve: Curve, search: Any) -> tuple[float, dict[str, Any]]:
    """Return the seconds of a fit with a search of the grid, and what fit.json has of it."""
    laws._looked = search
    start = time.process_time()
    result = extrapolate(curve.name, curve.points, TOLERANCE)
    seconds = time.process_time() - start
    return seconds, dict(_leaves(as_json([curve], [result], TOLERANCE)))


def _leaves(tree: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _leaves(value, f"{place}/{key}")
    else:
        yield place, tree


def difference(before: Any, now: Any) -> float:
    """Return by how much a leaf differs; words differ by nothing or without end, as the numbers in them are rounded."""
    if before == now:
        return 0.0
    if isinstance(before, float) and isinstance(now, float):
        return abs(now - before) / max(abs(before), abs(now))
    return math.inf


def measured(before: Any, now: Any, turns: int) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, shape in CURVES.items():
        curve, seconds, leaves = curve_of(*shape), {before: [], now: []}, {}
        for turn in range(turns):
            for search in (before, now) if turn % 2 else (now, before):
                took, leaves[search] = fitted(curve, search)
                seconds[search].append(took)
        old, new = (statistics.median(seconds[search]) for search in (before, now))
        by_place = {
            place: difference(leaves[before].get(place), leaves[now].get(place))
            for place in leaves[before] | leaves[now]
        }
        where = max(by_place, key=lambda place: by_place[place])
        row = {"seconds_before": round(old, 3), "seconds": round(new, 3), "ratio": round(old / new, 2)}
        yield name, row | {"largest_difference": by_place[where], "where": where}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="laws.py of another commit")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    spec = importlib.util.spec_from_file_location("laws_before", arguments.before)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    load, rows = [os.getloadavg()[0]], {}
    for name, row in measured(module._looked, laws._looked, arguments.turns):
        print(name, json.dumps(row), flush=True)
        rows[name] = row
    load.append(os.getloadavg()[0])
    if arguments.out:
        arguments.out.write_text(json.dumps({"load": load, "turns": arguments.turns, "curves": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
