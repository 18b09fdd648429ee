"""Writes the tables of slurm/SCALE.md: what is measured of the driver, and what follows for 64, 1,024 and 8,192 GPUs.

    python tests/benchmarks/scale.py [--page]

The driver's work is measured by scale_driver.py and scale_calls.py, in a process each. Everything goes to
results/scale.json, and the page's tables are made of that file; --page makes them without measuring.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from demo import machine
from scale_models import SIZES, model_named

from conversion.plan import plan

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS, PAGE = HERE / "results" / "scale.json", ROOT / "slurm" / "SCALE.md"
BEGIN, END = "<!-- made by tests/benchmarks/scale.py -->\n", "<!-- end of what it made -->\n"
RANKS = (64, 256, 1024, 4096, 8192)
GPUS, GPUS_A_NODE = (64, 1024, 8192), 8
LINKS, WRITER, FILE_SYSTEM = (25e9, 50e9), 2e9, 100e9  # bytes a second: of a GPU's network card; of a rank; of all
WIRE_BYTES, SAVED_BYTES = 2, 14  # a parameter in bfloat16; with its master weight and Adam's moments in float32


# --- measuring and computing


def run(program: str, *arguments: object) -> Any:
    """Return what a program of this folder prints."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(HERE / program), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{program}: {done.stderr[-2000:]}")
    print(done.stdout, file=sys.stderr, end="")
    return json.loads(done.stdout.splitlines()[-1])


def measured() -> dict[str, Any]:
    return {"driver": [run("scale_driver.py", ranks) for ranks in RANKS], "calls": run("scale_calls.py")}


def publish(name: str, gpus: int) -> dict[str, Any]:
    """Return what crosses the links where half of the GPUs train a model and half generate with it."""
    model, spread, ranks = model_named(name), SIZES[name], gpus // 2
    layout, engines = spread.layout(ranks), gpus // 2 // spread.workers
    start = time.process_time()
    copies = plan(model.megatron_tiles(layout, layout.senders()), model.vllm_tiles(spread.workers)).copies
    seconds = time.process_time() - start
    sent, taken = defaultdict[int, int](int), defaultdict[int, int](int)
    for copy in copies:
        num_bytes = WIRE_BYTES * copy.source.num_elements
        sent[copy.source.rank] += num_bytes * engines  # a message to each worker that wants it
        taken[copy.target.rank] += num_bytes
    cells = spread.tensor * spread.pipeline * layout.expert
    return {
        "parameters": model.num_parameters(),
        "layout": f"{spread.tensor} x {spread.pipeline} x {layout.data}" + f", {layout.expert}" * (layout.expert > 1),
        "ranks": ranks,
        "engines": engines,
        "workers": spread.workers,
        "copies": len(copies),
        "senders": len(sent),
        "sent_bytes": max(sent.values()),
        "taken_bytes": max(taken.values()),
        "all_bytes": sum(sent.values()),
        "cells": cells,
        "plan_seconds": round(seconds, 2),
    }


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Return the exponent of the power law that fits: least squares of the logarithms."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    x_mean, y_mean = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - x_mean) ** 2 for a in x)


# --- the page


def page(text: str, results: dict[str, Any]) -> str:
    """Return the page with its tables made anew; `text` is the page as it is."""
    above, begin, rest = text.partition(BEGIN)
    _, end, below = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE}: expected the lines {BEGIN.strip()!r} and {END.strip()!r} around its tables")
    return above + begin + "\n".join(_sections(results)) + "\n" + end + below


def _sections(results: dict[str, Any]) -> Iterator[str]:
    yield from _driver(results)
    yield from _calls(results)
    yield from _head(results)
    yield from _publish(results)
    yield from _checkpoints(results)
    yield from _files(results)


def _table(columns: Sequence[str], rows: Iterator[Sequence[object]] | Sequence[Sequence[object]]) -> Iterator[str]:
    yield "| " + " | ".join(columns) + " |"
    yield "| " + " | ".join("---" for _ in columns) + " |"
    for row in rows:
        yield "| " + " | ".join(map(str, row)) + " |"
    yield ""


def _seconds(value: float) -> str:
    return f"{value:.3g}"


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.3g}"


def _driver(results: dict[str, Any]) -> Iterator[str]:
    reports = results["driver"]
    of_step = "Processor seconds, all threads; a sequence a rank. `in the end`: between the two largest sizes."
    for heading, kind, rule in (
        ("The driver's own work in a step", "step", of_step),
        ("Once a run", "once", "Processor seconds of the driver. `open` makes the plan and takes it apart."),
    ):
        yield from (f"## {heading}\n", rule, "")
        names = [*reports[0][kind], *(["all"] if kind == "step" else [])]
        columns = [f"{report['ranks']:,} ranks, {report['engines']:,} engines" for report in reports]
        rows = []
        for name in names:
            values = _part(reports, kind, name)
            growths = _growth(reports, values), _growth(reports[-2:], values[-2:], fewest=2)
            rows.append([name, *map(_seconds, values), *growths])
        columns += ["grows as ranks^", "in the end"]
        yield from _table(["part", *columns], rows)


def _part(reports: Sequence[dict[str, Any]], kind: str, name: str) -> list[float]:
    return [sum(report[kind].values()) if name == "all" else report[kind][name] for report in reports]


def _growth(reports: Sequence[dict[str, Any]], values: Sequence[float], fewest: int = 3) -> str:
    """Return the exponent over the sizes at which the work is long enough to be measured; "" where they are too few."""
    pairs = [(report["ranks"], value) for report, value in zip(reports, values, strict=True) if value >= 2e-3]
    return f"{slope(*zip(*pairs, strict=True)):.2f}" if len(pairs) >= fewest else ""


def _calls(results: dict[str, Any]) -> Iterator[str]:
    calls = results["calls"]["seconds"]
    yield from (
        "## What Ray adds to a call\n",
        "Processor seconds of the driver for calls made at once and waited for.",
        "",
    )
    growth = slope([*map(int, calls)], [*calls.values()])
    columns = [*(f"{int(size):,} calls" for size in calls), "grows as calls^"]
    yield from _table(columns, [[*map(_seconds, calls.values()), f"{growth:.2f}"]])


def _head(results: dict[str, Any]) -> Iterator[str]:
    sizes, per_call = results["calls"]["bytes"], _call_seconds(results)
    yield from ("## Ray: actors, calls and bytes a step\n",)
    yield "The 7B model, half of the GPUs training, a sequence a GPU. Calls: `step` on every rank, `publish` and"
    yield "`digests` on those that send, `update`, `audit` and `generate` on every engine, and an answer a sequence."
    yield ""
    rows = []
    for gpus in GPUS:
        of = results["publish"]["7B"][str(gpus)]
        ranks, engines, nodes = of["ranks"], of["engines"], -(-of["ranks"] // GPUS_A_NODE)
        calls = ranks + 2 * of["senders"] + 3 * engines + gpus
        batch = sizes["batch_a_sequence"] * gpus
        drawn = (sizes["request"] + sizes["response"]) * gpus
        digests = sizes["digest"] * of["copies"] * (1 + engines)
        rows.append(
            (
                f"{gpus:,}",
                f"{ranks + engines:,}",
                f"{calls:,}",
                _seconds(calls * per_call),
                f"{drawn / 1e6:.3g}",
                f"{batch / 1e6:.3g} x {nodes:,}",
                f"{digests / 1e6:.3g}",
            )
        )
    yield from _table(
        ["GPUs", "actors", "calls", "driver s", "requests and responses, MB", "batch, MB x nodes", "digests, MB"], rows
    )


def _call_seconds(results: dict[str, Any]) -> float:
    seconds = results["calls"]["seconds"]
    size = max(seconds, key=int)
    return seconds[size] / int(size)


def _publish(results: dict[str, Any]) -> Iterator[str]:
    yield "## A publish\n"
    yield "Half of the GPUs train, half generate. Out of a rank: the pieces that the plan takes from it, once for each"
    yield "worker of each engine that wants them; the least time is that of the busiest link."
    yield ""
    rows = []
    for name, by_gpus in results["publish"].items():
        for gpus, of in by_gpus.items():
            times = " / ".join(_seconds(max(of["sent_bytes"], of["taken_bytes"]) / link) for link in LINKS)
            rows.append(
                (
                    f"{name}, {int(gpus):,}",
                    of["layout"],
                    f"{of['engines']:,} of {of['workers']}",
                    f"{of['copies']:,}",
                    f"{of['senders']:,}",
                    _gb(of["sent_bytes"]),
                    _gb(of["taken_bytes"]),
                    _gb(of["all_bytes"]),
                    times,
                    _seconds(of["plan_seconds"]),
                )
            )
    links = " / ".join(f"{link / 1e9:.0f}" for link in LINKS)
    columns = ["model, GPUs", "tensor x pipeline x data, expert", "engines", "copies", "ranks that send"]
    columns += ["out of one, GB", "into a worker, GB", "in all, GB", f"s at {links} GB/s", "plan, s"]
    yield from _table(columns, rows)


def _checkpoints(results: dict[str, Any]) -> Iterator[str]:
    yield "## A checkpoint\n"
    yield f"{SAVED_BYTES} bytes a parameter: weights in bfloat16, master weights and two moments in float32."
    yield "Every rank writes what it has of the optimiser; the first replica's write the weights too. Seconds are the"
    yield f"larger of bytes one of these at {WRITER / 1e9:.0f} GB/s and of all bytes at {FILE_SYSTEM / 1e9:.0f} GB/s;"
    yield "training goes on meanwhile."
    yield ""
    rows = []
    for name, by_gpus in results["publish"].items():
        for gpus, of in by_gpus.items():
            parameters = of["parameters"]
            most = parameters * (WIRE_BYTES / of["cells"] + (SAVED_BYTES - WIRE_BYTES) / of["ranks"])
            seconds = max(most / WRITER, SAVED_BYTES * parameters / FILE_SYSTEM)
            saved = (_gb(SAVED_BYTES * parameters), f"{of['ranks']:,}", _gb(most), _seconds(seconds))
            rows.append((f"{name}, {int(gpus):,}", *saved))
    yield from _table(["model, GPUs", "GB", "ranks that write", "GB of one, at most", "s"], rows)


def _files(results: dict[str, Any]) -> Iterator[str]:
    files, of_model = results["calls"]["files"], results["publish"]["7B"]
    yield "## Files\n"
    yield "The 7B model. A checkpoint: a file a rank, and 9 more. A step: one of rollouts, of which"
    yield f"`rollout.keep` are kept, and a line of metrics. Ray's sessions: {files['session']} files a node and"
    yield f"{files['actor']:g} an actor, on local disks."
    yield ""
    rows = []
    for gpus in GPUS:
        of, nodes = of_model[str(gpus)], gpus // GPUS_A_NODE
        actors = of["ranks"] + of["engines"]
        session = nodes * files["session"] + actors * files["actor"]
        rows.append((f"{gpus:,}", f"{of['ranks'] + 9:,}", 1, f"{session:,.0f}", f"{session / nodes:,.0f}"))
    yield from _table(["GPUs", "a checkpoint", "a step", "Ray's sessions", "on a node"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true")
    arguments = parser.parse_args()
    if not arguments.page:
        results = {"machine": machine(), "load": [os.getloadavg()[0]]} | measured()
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        results["publish"] = {name: {str(gpus): publish(name, gpus) for gpus in GPUS} for name in SIZES}
        results["load"].append(os.getloadavg()[0])
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    main()
