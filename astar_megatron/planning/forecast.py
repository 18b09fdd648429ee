"""What a run will take before anything of it exists: memory by process, seconds of a step, GPU hours; for `astar plan`.

Of the model it reads config.json, of the prompts how many there are. The GPUs are those of `slurm.nodes` and
`slurm.gpus_per_node`, nodes of 8 where the latter is 0. Leaves out: what only the machine knows (`astar doctor`).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from astar_megatron.cluster.demands import idle_nodes, num_used
from astar_megatron.cluster.placement import Node, Placement, PlacementError, place
from astar_megatron.config import ParallelConfig, RunConfig
from astar_megatron.data.rows import Problems, read_rows
from astar_megatron.model import layouts
from astar_megatron.model.gpus import FUSED_PACKS_CAPABILITY, Gpu, refused_fp8
from astar_megatron.planning.capacity import Cache, Process, cache, processes
from astar_megatron.planning.pace import StepSeconds, generation_seconds, step_seconds
from astar_megatron.run import accelerators, resources
from astar_megatron.run.resources import Machine, gib
from conversion.families import Model

_USUAL_GPUS = 8  # of a node
_SMALL_MODEL = 1_000_000_000  # parameters
_MEASURED = "H200"  # of an H100 the LM head alone was


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a run takes, and in words why it does not fit, if so. Without a GPU no seconds; nor with `problems`."""

    processes: list[Process]
    problems: list[str]
    num_gpus: int = 0
    where: str = ""
    host_bytes: int = 0  # of all nodes, beside GPUs
    cache: Cache | None = None
    sharing: str = ""  # in words, of GPUs that have both sides
    seconds: StepSeconds | None = None
    training_hours: float = 0.0  # GPU hours, of all GPUs that the nodes hold
    training_clock_hours: float = 0.0
    stage_1_hours: float | None = None  # None: not known, or the run reads no table
    stage_1_clock_hours: float | None = None
    cautions: tuple[str, ...] = ()  # where the seconds are known to be too few, or stand on nothing measured

    @property
    def fits(self) -> bool:
        return not self.problems


def forecast(cfg: RunConfig, model: Model, gpu: Gpu | None, num_prompts: int | None) -> Forecast:
    """Return what a run takes on this kind of GPU, or on cores. Pure.

    Raises ValueError for what no memory could mend: a layout that does not divide the model, more tokens than it has
    positions.
    """
    layouts.check_lengths(model, cfg.model.path, max_tokens=cfg.max_tokens)
    layouts.check(cfg.parallel, model, sequences=cfg.mini_batch_size)
    model.vllm_tiles(cfg.rollout.tensor)
    own = processes(cfg, model, gpu)
    if gpu is None:
        return Forecast(processes=own, problems=[])
    problems, placement = problems_of(cfg, model, gpu, own)
    if placement is None:
        return Forecast(processes=own, problems=problems)
    shared, num_gpus = bool(placement.shared), sum(len(names) for names in placement.gpus().values())
    fields = {"processes": own, "num_gpus": num_gpus, "where": placement.describe()}
    fields |= {"host_bytes": _host_bytes(cfg, model, num_gpus), "cache": cache(cfg, model, gpu)}
    if problems:
        return Forecast(problems=problems, **fields)
    nodes = len({seat.node for seat in placement.ranks})
    seconds = step_seconds(cfg, model, gpu, shared=shared, num_nodes=nodes)
    training_clock_hours = cfg.train.num_steps * seconds.total / 3600
    stage_1_clock_hours = _stage_1_clock_hours(cfg, model, gpu, num_prompts)
    engines = placement_of(cfg, model, with_policy=False)
    return Forecast(
        problems=[],
        sharing=accelerators.shares_of(cfg, model, gpu.memory_bytes).describe() if shared else "",
        seconds=seconds,
        training_hours=training_clock_hours * _num_held(cfg, placement),
        training_clock_hours=training_clock_hours,
        stage_1_hours=stage_1_clock_hours and stage_1_clock_hours * _num_held(cfg, engines),
        stage_1_clock_hours=stage_1_clock_hours,
        cautions=tuple(_cautions(cfg, model, gpu)),
        **fields,
    )


def problems_of(cfg: RunConfig, model: Model, gpu: Gpu, own: Sequence[Process]) -> tuple[list[str], Placement | None]:
    """Return what does not fit, of the run's `own` processes, and where they would go if that fits."""
    refused = [refused_fp8(cfg.model.fp8, gpu.capability)]
    placement, shortages = None, list[str]()
    try:
        placement = placement_of(cfg, model)
        refused.append(idle_nodes(cfg, placement))
        if placement.shared:  # then ranks are among the shortages
            own = [each for each in own if each.limit_bytes != gpu.memory_bytes]
            shortages = accelerators.shortages(cfg, model, gpu.memory_bytes)
    except PlacementError as error:
        refused.append(str(error))
    large = [_problem(each, gpu) for each in own if not each.fits]
    return [*large, *shortages, *filter(None, refused)], placement


def count_prompts(cfg: RunConfig) -> int | None:
    """Return how many rows `data.path` has; None where there is no such file yet. Raises PromptError."""
    if not Path(cfg.data.path).exists():
        return None
    problems = Problems(cfg.data.path)
    rows = read_rows(cfg.data.path, problems)
    problems.refuse(len(rows) + problems.count)
    return len(rows)


def placement_of(cfg: RunConfig, model: Model, *, with_policy: bool = True) -> Placement:
    """Return where ranks, if asked for, and engines go on the nodes of the section slurm. Raises PlacementError."""
    size, numbers = gpus_of_a_node(cfg), range(1, cfg.slurm.nodes + 1)
    nodes = [Node(address=f"node {number}", num_gpus=size) for number in numbers]

    def parts() -> Iterable[ParallelConfig]:
        return layouts.parts(cfg.parallel, model, sequences=cfg.mini_batch_size)

    return place(nodes, cfg.parallel if with_policy else None, cfg.rollout, cfg.cluster.share_gpus, parts)


def gpus_of_a_node(cfg: RunConfig) -> int:
    """Return how many GPUs a node is planned with."""
    return cfg.slurm.gpus_per_node or _USUAL_GPUS


def _problem(process: Process, gpu: Gpu) -> str:
    assert process.limit_bytes is not None
    share = "" if process.limit_bytes == gpu.memory_bytes else "the engine's share of "
    return f"{process.name}: {gib(process.needs_bytes)}, {share}one {gpu.name} has {gib(process.limit_bytes)}"


def _host_bytes(cfg: RunConfig, model: Model, num_gpus: int) -> int:
    machine = Machine(memory_bytes=0, shared_bytes=0, num_accelerators=num_gpus)
    return resources.needs(cfg, model, machine).memory_bytes


def _cautions(cfg: RunConfig, model: Model, gpu: Gpu) -> Iterator[str]:
    if model.num_parameters() < _SMALL_MODEL:
        yield "a model of this size takes longer: launches of kernels, which are not counted, are most of its time"
    if cfg.model.dtype == "float32":
        yield "peaks are those of bfloat16; float32 takes longer, many times where its products are exact"
    if cfg.parallel.world_size > 1 or cfg.rollout.tensor > 1:
        yield "what GPUs send each other is planned at the data sheet's rates; no run of several has been measured"
    if gpu.capability < FUSED_PACKS_CAPABILITY:
        yield (
            f"Transformer Engine has no fused attention for packs on {gpu.name}: without flash-attn, which it takes "
            "then, attention needs memory by the square of the length, which is not counted"
        )
    if model.dims.num_experts:
        yield "no model with experts has been measured: its layers' share of the peak is that of a dense model"
    if cfg.optim.offload:
        yield "with optim.offload Adam computes on the host, which takes longer: only what the link moves is counted"
    if gpu.name != _MEASURED:
        yield f"no run on {gpu.name} has been measured: the share of its peak that layers reach is an {_MEASURED}'s"


def _num_held(cfg: RunConfig, placement: Placement) -> int:
    """The GPUs of whole nodes, those in reserve too, as `astar launch` asks for them; else those with a process."""
    of_nodes = (num_used(placement) + cfg.slurm.spare_nodes) * cfg.slurm.gpus_per_node
    return of_nodes or sum(len(names) for names in placement.gpus().values())


def _stage_1_clock_hours(cfg: RunConfig, model: Model, gpu: Gpu, num_prompts: int | None) -> float | None:
    """Of an empty table."""
    if num_prompts is None or not cfg.asks_stage_1:
        return None
    extra = ceil(cfg.sweep.extra_tokens / cfg.sampling.max_response_tokens)
    responses = num_prompts * cfg.sweep.num_samples + extra
    return generation_seconds(cfg, model, gpu, responses, num_prompts) / 3600
