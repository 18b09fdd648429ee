"""What a V* table holds, on the screen and as plots: `astar sweep --inspect`. Needs no model, no Ray and no engine.

Leaves out: the responses, which stay on disk (column `response` of the shards, any Parquet reader).
"""

import math
from itertools import pairwise
from pathlib import Path

import numpy as np

from astar_megatron.config import RunConfig, SweepConfig
from astar_megatron.data.contract import contract_of, described
from astar_megatron.data.estimates import Estimates
from astar_megatron.data.files import make_folder, write_figure
from astar_megatron.data.header import differences, stored_contract
from astar_megatron.data.v_star import TableError, VStarTable
from astar_megatron.run.tracking import Tracker

_QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
_BAR = 40  # characters of the longest bar


def main(cfg: RunConfig) -> None:
    """Show the run's table and write `<run_dir>/v_star.png`. Raises what VStarTable.open does, TableError if empty."""
    table = VStarTable.open(cfg.table_dir, contract=None)
    summary = table.summary()
    if not summary.samples:
        raise TableError(f"{table.folder}: the V* table has no rows yet; run `astar sweep` with this configuration")
    estimates = table.estimate(cfg.beta1)
    tracker = Tracker(cfg.run_dir)
    samples = np.unique(estimates.samples, return_counts=True)
    tracker.table(
        f"V* table {table.folder}, beta1 = {cfg.beta1:g}",
        [
            *summary.rows(),
            ("samples a prompt", ", ".join(f"{n}: {count} prompts" for n, count in zip(*samples, strict=True))),
        ],
    )
    tracker.say(_counting(cfg.sweep, estimates.samples))
    made = stored_contract(table.folder)
    tracker.table("made under this contract", described(made))
    tracker.say(_fits(cfg, table.folder))
    tracker.table("prompts by mean reward", _histogram(estimates.mean))
    shown = {"V*": estimates.v_star, "standard error": estimates.error, "width of the 95 % interval": estimates.width}
    tracker.table(
        "quantiles over the prompts: " + ", ".join(f"{q:.0%}" for q in _QUANTILES),
        [(name, _quantiles(x)) for name, x in shown.items()],
    )
    make_folder(cfg.run_dir)
    tracker.say(f"plots in {plot(estimates, Path(cfg.run_dir) / 'v_star.png')}")


def _counting(cfg: SweepConfig, samples: np.ndarray) -> str:
    """Of which samples the shown V* is, and of which training's is where those are fewer."""
    words = "V* is shown of all these samples"
    if (samples <= cfg.num_samples).all():
        return words
    words += f"; training with this configuration takes the first {cfg.num_samples} of a prompt (sweep.num_samples)"
    return words + f", and as many more as sweep.extra_tokens={cfg.extra_tokens} bought" * bool(cfg.extra_tokens)


def _fits(cfg: RunConfig, folder: Path) -> str:
    """Whether a run of this configuration could use the table; to know that takes its model's folder."""
    try:
        lines = differences(folder, contract_of(cfg))
    except (ImportError, ValueError) as error:  # no transformers here, no model, a reward that is not here
        return f"not compared with this run's contract: {error}"
    return f"this run can't use it: {'; '.join(lines)}" if lines else "this run's contract is the same"


def _quantiles(values: np.ndarray) -> str:
    """Of those that are known: a single sample has no standard error."""
    known = values[np.isfinite(values)]
    if not len(known):
        return "unknown: it takes more than one sample"
    rest = f"  (of {len(known)} prompts; the others have one sample)" if len(known) < len(values) else ""
    return "  ".join(f"{v:.3f}" for v in np.quantile(known, _QUANTILES)) + rest


def _histogram(mean: np.ndarray) -> list[tuple[str, str]]:
    """Ten ranges of the mean reward with a bar each, before and after them what is at its ends.

    These are 0 and 1, or the whole numbers around what is less or more.
    """
    low, high = min(0, math.floor(mean.min())), max(1, math.ceil(mean.max()))
    inner = mean[(mean > low) & (mean < high)]
    counts, edges = np.histogram(inner, bins=10, range=(low, high))
    counts = [int((mean <= low).sum()), *counts.tolist(), int((mean >= high).sum())]
    ranges = [f"{start:.1f} to {end:.1f}" for start, end in pairwise(edges)]
    names = [f"{low} or less", *ranges, f"{high} or more"]
    most = max(counts)
    return [(name, f"{n:>8} {'#' * round(_BAR * n / most)}".rstrip()) for name, n in zip(names, counts, strict=True)]


def plot(estimates: Estimates, path: Path) -> Path:
    """Draw mean rewards, V* and interval widths of the prompts to `path` and return it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (rates, values, widths) = pyplot.subplots(1, 3, figsize=(11, 3.4), dpi=120)
    rates.hist(estimates.mean, bins=21, color="#2a6f97")
    rates.set(xlabel="mean reward", ylabel="prompts")
    order = np.lexsort((estimates.width, estimates.v_star))
    share = (np.arange(len(order)) + 0.5) / len(order)
    values.fill_between(share, estimates.low[order], estimates.high[order], color="#a9cfe3", linewidth=0)
    values.plot(share, estimates.v_star[order], color="#2a6f97")
    values.set(xlabel="share of the prompts", ylabel="V*, 95 % interval")
    widths.hist(estimates.width, bins=21, color="#2a6f97")
    widths.set(xlabel="width of the interval", ylabel="prompts")
    for axes in (rates, values, widths):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    write_figure(path, figure)
    pyplot.close(figure)
    return path
