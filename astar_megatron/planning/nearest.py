"""The nearest settings with which a planned run fits its GPUs: the fewest changes, then the fewest GPU hours.

Looked at are smaller forward passes, what can be computed again or lie in host memory, no FP8, the engines' share and
tensor axis, other layouts, of tensor and pipeline together too, GPUs for both sides, no drawing ahead, more nodes: one
of these changed, else two, else three.
Nodes that would have nothing to do are left out of each: no run may start on such.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations, product
from math import ceil
from typing import Any

from astar_megatron import config
from astar_megatron.cluster.demands import num_used
from astar_megatron.config import RunConfig
from astar_megatron.model.gpus import Gpu
from astar_megatron.planning.capacity import processes
from astar_megatron.planning.forecast import Forecast, forecast, gpus_of_a_node, problems_of
from astar_megatron.run.accelerators import micro_batch_tokens
from conversion.families import Model

MOST_CHANGES, _MOST_SHOWN = 3, 3
_FACTORS = (2, 4, 8)
_ENOUGH = -1  # nodes: as many as the other changes make necessary

type Change = Mapping[str, Any]  # keys of the configuration, to their values


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbour:
    """Settings that differ from the run's and fit."""

    change: Change
    forecast: Forecast

    def describe(self) -> str:
        """Return the change as the command line takes it."""
        return " ".join(f"--set {key}={_yaml(value)}" for key, value in self.change.items())


def nearest(cfg: RunConfig, model: Model, gpu: Gpu, num_prompts: int | None) -> list[Neighbour]:
    """Return up to three neighbours, the cheapest step first; none where up to three changes don't do. Pure."""
    for choices in _choices(cfg):
        neighbours = [
            neighbour
            for chosen in choices
            for picked in product(*chosen)
            if (neighbour := _neighbour(cfg, _joined(cfg, picked), model, gpu, num_prompts))
        ]
        if neighbours:
            best = {frozenset(near.change): near for near in sorted(neighbours, key=_cost, reverse=True)}
            return sorted(best.values(), key=_cost)[:_MOST_SHOWN]  # the cheapest of those that change the same keys
    return []


def _cost(neighbour: Neighbour) -> float:
    return neighbour.forecast.training_hours


def _neighbour(cfg: RunConfig, change: Change, model: Model, gpu: Gpu, num_prompts: int | None) -> Neighbour | None:
    """None where the settings don't fit or can't be had, for whatever reason: another neighbour may do."""
    try:
        near = config.validate(config.with_values(cfg.model_dump(), change))
        own = processes(near, model, gpu)
        if not all(process.fits for process in own):
            return None
        problems, placement = problems_of(near, model, gpu, own)
        if placement and (used := num_used(placement)) < near.slurm.nodes:
            return _neighbour(cfg, {**change, "slurm.nodes": used}, model, gpu, num_prompts)
        if problems:
            return None
        if near.slurm.nodes == cfg.slurm.nodes:
            change = {key: value for key, value in change.items() if key != "slurm.nodes"}
        return Neighbour(change=change, forecast=forecast(near, model, gpu, num_prompts))
    except ValueError:
        return None


def _choices(cfg: RunConfig) -> Iterator[list[tuple[list[Change], ...]]]:
    """Yield the kinds that may change at once, the fewest first: none, which leaves idle nodes out, to all three.

    Of layouts one axis, and where no such change does two.
    """
    kinds, one_axis, two_axes = [list(kind) for kind in _changes(cfg)], list(_layouts(cfg)), list(_wider_layouts(cfg))
    for count in range(MOST_CHANGES + 1):
        yield list(combinations([*kinds, one_axis], count))
        if count:
            yield [(*chosen, two_axes) for chosen in combinations(kinds, count - 1)]


def _changes(cfg: RunConfig) -> Iterator[Iterable[Change]]:
    """Of each kind the changes that there are, but for layouts."""
    tokens, share = micro_batch_tokens(cfg), cfg.rollout.gpu_memory_utilization
    smaller = (tokens // factor for factor in _FACTORS)
    yield ({"train.micro_batch_tokens": size} for size in smaller if size >= cfg.max_tokens)
    yield _other("parallel.recompute", cfg.parallel.recompute, ["full"])
    yield _other("model.fp8", cfg.model.fp8, [None])
    yield _other("model.reference", cfg.model.reference, ["offload"])
    yield _other("optim.offload", cfg.optim.offload, [True])
    yield _other("train.offload", cfg.train.offload, ["optimizer", "all"])
    yield ({"rollout.gpu_memory_utilization": new} for new in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8) if abs(new - share) > 0.05)
    yield _engines(cfg)
    yield _other("rollout.max_staleness", cfg.rollout.max_staleness, [0])
    yield _other("cluster.share_gpus", bool(cfg.cluster.share_gpus), [True])
    yield [{"slurm.nodes": _ENOUGH}]


def _other(key: str, now: object, values: Iterable[object]) -> list[Change]:
    return [{key: value} for value in values if value != now]


def _engines(cfg: RunConfig) -> Iterator[Change]:
    """Engines of more workers: on as many GPUs where that goes, and as many engines as all GPUs hold."""
    for factor in _FACTORS:
        workers, engines = factor * cfg.rollout.tensor, cfg.rollout.num_engines
        for number in dict.fromkeys((max(1, engines // factor), max(1, min(engines, _num_gpus(cfg) // workers)))):
            yield {"rollout.tensor": workers, "rollout.num_engines": number}


def _layouts(cfg: RunConfig) -> Iterator[Change]:
    """More ranks to a copy of the model, on as many GPUs where that goes; and as many copies on more."""
    parallel = cfg.parallel
    for axis, factor in product(("tensor", "pipeline", "context", "expert"), _FACTORS):
        key, size = f"parallel.{axis}", factor * getattr(parallel, axis)
        if axis == "expert":
            yield {key: size}
            continue
        if parallel.data % factor == 0:
            yield {key: size, "parallel.data": parallel.data // factor}
        yield {key: size}
    yield from ({"parallel.data": factor * parallel.data} for factor in _FACTORS)


def _wider_layouts(cfg: RunConfig) -> Iterator[Change]:
    """More ranks to a copy of the model by two axes, tensor inside a node and pipeline; as many copies as GPUs hold."""
    parallel = cfg.parallel
    for tensor, pipeline in product(_FACTORS, _FACTORS):
        sizes = tensor * parallel.tensor, pipeline * parallel.pipeline
        if sizes[0] <= gpus_of_a_node(cfg):
            most = _num_gpus(cfg) // (sizes[0] * sizes[1] * parallel.context)
            data = max((d for d in range(1, most + 1) if parallel.data % d == 0), default=1)
            yield {"parallel.tensor": sizes[0], "parallel.pipeline": sizes[1], "parallel.data": data}


def _num_gpus(cfg: RunConfig) -> int:
    return cfg.slurm.nodes * gpus_of_a_node(cfg)


def tried(cfg: RunConfig) -> list[str]:
    """Return the keys that the neighbours of a run differ in."""
    return list(dict.fromkeys(key for kind in (*_changes(cfg), _layouts(cfg)) for change in kind for key in change))


def _joined(cfg: RunConfig, changes: Iterable[Change]) -> Change:
    """Return all of the changes, with as many nodes as both sides then need."""
    change = {key: value for part in changes for key, value in part.items()}
    if "slurm.nodes" in change:
        tree = config.with_values(cfg.model_dump(), change)
        axes, engines = tree["parallel"], tree["rollout"]
        ranks = axes["tensor"] * axes["pipeline"] * axes["context"] * axes["data"]
        sides = ranks, engines["num_engines"] * engines["tensor"]
        wanted = max(sides) if tree["cluster"]["share_gpus"] else sum(sides)
        change["slurm.nodes"] = max(cfg.slurm.nodes + 1, ceil(wanted / gpus_of_a_node(cfg)))
    return change


def _yaml(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
