"""Stage 1 of a comparison: one V* table for all methods that read it, and what it cost each of them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from astar_megatron.config import RunConfig
from astar_megatron.data.allocation import run_lengths
from astar_megatron.run.commands import CommandEnd
from astar_megatron.run.prepare import Inputs
from astar_megatron.run.spending import generation_flops
from astar_megatron.run.tracking import read_stage_1_seconds
from astar_megatron.studies import comparison
from astar_megatron.studies.comparison import Budget, Run, Stage1Cost
from astar_megatron.studies.comparison_files import STAGE_1

type Lengths = Sequence[Sequence[int]]  # of each prompt's responses, in tokens


def known_costs(configs: Mapping[Run, RunConfig], limit: Budget, inputs: Inputs, folder: Path) -> dict[str, Stage1Cost]:
    """Return by method what stage 1 has cost where its table lacks nothing; writes nothing.

    Raises ValueError where the budget can't be kept by a method whose table lacks something.
    """
    costs = {}
    for method, cfg in _readers(configs).items():
        drawn, lacking = run_lengths(cfg, inputs.contract, inputs.prompts)
        if lacking:
            _check(cfg, limit, drawn, lacking, folder)
        else:
            costs[method] = _cost(cfg, inputs, drawn, folder)
    return costs


def stage_1_of(
    seed: int,
    configs: Mapping[Run, RunConfig],
    limit: Budget,
    inputs: Inputs,
    folder: Path,
    finished: Iterable[Run],
    sweep: Callable[[RunConfig], CommandEnd],
) -> tuple[dict[str, Stage1Cost], dict[str, str]]:
    """Fill the V* table as each method reads it, and return by method what that cost, or why it could not be filled.

    Nothing of a method that does not read it. `sweep` runs stage 1 of a configuration. Raises ValueError where the
    budget can't be kept, and where what a run of `finished` has cost is not known.
    """
    costs, failures = {}, {}
    for method, cfg in _readers(configs).items():
        drawn, lacking = run_lengths(cfg, inputs.contract, inputs.prompts)
        if lacking and failures:  # of the same table
            failures[method] = next(iter(failures.values()))
        elif lacking:
            _check(cfg, limit, drawn, lacking, folder)
            end = sweep(cfg.model_copy(update={"run_dir": str(folder / STAGE_1), "seed": seed}))
            drawn, lacking = run_lengths(cfg, inputs.contract, inputs.prompts)
            if end.status:
                failures[method] = f"stage 1 failed: {end.error}; run the same command again: it keeps what was drawn"
            elif lacking:
                failures[method] = f"stage 1 left {lacking} samples undrawn; run the same command again"
        if method not in failures:
            costs[method] = _cost(cfg, inputs, drawn, folder)
    if lost := [run for run in finished if run.cell in failures]:
        raise ValueError(f"{failures[lost[0].cell]} {lost[0].name} has finished, and what it cost is not known")
    return costs, failures


def _readers(configs: Mapping[Run, RunConfig]) -> dict[str, RunConfig]:
    """A configuration of each method that reads stage 1."""
    return {run.cell: cfg for run, cfg in configs.items() if cfg.asks_stage_1}


def _check(cfg: RunConfig, limit: Budget, drawn: Lengths, lacking: int, folder: Path) -> None:
    comparison.check_tokens(cfg, limit, sum(map(sum, drawn)) + lacking)
    comparison.check_seconds(cfg, limit, _seconds(cfg, drawn, folder))


def _cost(cfg: RunConfig, inputs: Inputs, drawn: Lengths, folder: Path) -> Stage1Cost:
    return Stage1Cost(
        tokens=sum(map(sum, drawn)),
        flops=generation_flops(inputs.model, zip(inputs.prompts, drawn, strict=True)),
        seconds=_seconds(cfg, drawn, folder),
    )


def _seconds(cfg: RunConfig, drawn: Lengths, folder: Path) -> float | None:
    return read_stage_1_seconds(folder / STAGE_1, cfg.table_dir, sum(map(len, drawn)))
