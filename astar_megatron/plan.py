"""PROGRAM: what a run will take of GPUs: memory, seconds, GPU hours, and what would fit; nothing is started.

It needs neither torch nor a GPU. `--json` prints the same figures, sizes in bytes.
"""

import json
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

from astar_megatron.config import RunConfig
from astar_megatron.model import gpus
from astar_megatron.model.compute_type import compute_type
from astar_megatron.planning.forecast import Forecast, count_prompts, forecast
from astar_megatron.planning.nearest import MOST_CHANGES, Neighbour, nearest, tried
from astar_megatron.run.resources import GIB, gib
from astar_megatron.run.tracking import Screen
from conversion.families import read_model


def main(cfg: RunConfig, gpu_name: str | None, *, as_json: bool) -> int:
    """Say what the run takes on this kind of GPU (None: on cores); returns 0 where it fits, else 1.

    Raises ValueError where no GPU could run it: an unknown model, a layout that does not divide it, longer sequences.
    """
    gpu = None if gpu_name is None else gpus.named(gpu_name)
    if gpu is None:  # auto is what ranks would choose here
        dtype, _ = compute_type(cfg.model.dtype, num_gpus=0)
        cfg = cfg.model_copy(update={"model": cfg.model.model_copy(update={"dtype": dtype})})
    model, num_prompts = read_model(cfg.model.path), count_prompts(cfg)
    ahead, screen = forecast(cfg, model, gpu, num_prompts), Screen()
    if not as_json:
        _show(screen, cfg, ahead)
    neighbours: list[Neighbour] = []
    if not ahead.fits and gpu is not None:
        with nullcontext() if as_json else screen.waiting("looking for what fits"):
            neighbours = nearest(cfg, model, gpu, num_prompts)  # up to half a minute
    if as_json:
        print(json.dumps(_fields(ahead, neighbours), indent=1))
    elif not ahead.fits:
        _show_nearest(screen, cfg, neighbours)
    return 0 if ahead.fits else 1


def _fields(ahead: Forecast, neighbours: list[Neighbour]) -> dict[str, Any]:
    """Return the forecast as JSON has it."""
    fields = asdict(ahead) | {"fits": ahead.fits, "seconds": ahead.seconds and ahead.seconds.parts()}
    fields["nearest"] = [
        {"change": dict(near.change), "step_seconds": near.forecast.seconds and near.forecast.seconds.total}
        | {key: getattr(near.forecast, key) for key in ("num_gpus", "training_hours", "training_clock_hours")}
        for near in neighbours
    ]
    return fields


def _show(screen: Screen, cfg: RunConfig, ahead: Forecast) -> None:
    screen.table("memory of each, GiB", [*_memory_rows(cfg, ahead)])
    if ahead.sharing:
        screen.say(ahead.sharing)
    if ahead.seconds:
        title = f"seconds of a step; responses of {cfg.sampling.max_response_tokens} tokens, the longest there may be"
        parts = ahead.seconds.parts().items()
        screen.table(title, [(name, f"{seconds:.2f}") for name, seconds in parts if seconds])
        screen.say(_cost(cfg, ahead))
        for caution in ahead.cautions:
            screen.say(caution)
    elif ahead.fits:
        screen.say("seconds are planned for GPUs: name one with --gpu")
    for problem in ahead.problems:
        screen.say(f"does not fit: {problem}")


def _show_nearest(screen: Screen, cfg: RunConfig, neighbours: list[Neighbour]) -> None:
    for near in neighbours:
        ahead = near.forecast
        assert ahead.seconds is not None
        took = f"{ahead.seconds.total:.1f} s a step on {ahead.num_gpus} GPUs"
        screen.say(f"fits: {near.describe()}: {took}, {_hours(ahead.training_hours, ahead.training_clock_hours)}")
    if not neighbours:
        screen.say(
            f"nothing near fits: up to {MOST_CHANGES} changes at once were tried, of {', '.join(tried(cfg))}; take "
            "GPUs with more memory, a smaller model, or change more of these at once"
        )


def _memory_rows(cfg: RunConfig, ahead: Forecast) -> list[tuple[str, str]]:
    rows = []
    for process in ahead.processes:
        limit = f" of {process.limit_bytes / GIB:.1f}" if process.limit_bytes is not None else ""
        parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in process.parts.items())
        times = f"{process.count} x " if process.count > 1 else ""
        rows.append((process.name, f"{times}{process.total_bytes / GIB:.1f}{limit}: {parts}"))
    if ahead.cache:
        count = ahead.cache.num_tokens // cfg.max_tokens
        rows.append(("an engine's cache", f"{count} sequences of {cfg.max_tokens} tokens"))
    if ahead.host_bytes:
        rows.append(("host memory", f"at least {gib(ahead.host_bytes)}, of all nodes"))
    if all(process.limit_bytes is None for process in ahead.processes):  # on cores
        total = sum(process.count * process.total_bytes for process in ahead.processes)
        rows.append(("in all", gib(total)))
    return rows


def _cost(cfg: RunConfig, ahead: Forecast) -> str:
    training = _hours(ahead.training_hours, ahead.training_clock_hours)
    words = f"{ahead.where}; {cfg.train.num_steps} steps: about {training}"
    if ahead.stage_1_hours is not None and ahead.stage_1_clock_hours is not None:
        return f"{words}; stage 1: about {_hours(ahead.stage_1_hours, ahead.stage_1_clock_hours)}"
    return f"{words}; stage 1 not counted: {cfg.data.path} is not there yet" if cfg.asks_stage_1 else words


def _hours(of_gpus: float, clock: float) -> str:
    return f"{of_gpus:.1f} GPU hours, {clock:.1f} by the clock"
