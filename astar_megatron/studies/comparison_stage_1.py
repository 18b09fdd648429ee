"""Stage 1 of a comparison: one V* table for all methods that read it, and what it cost each of them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from astar_megatron.config import RunConfig
from astar_megatron.data.allocation import run_lengths
from astar_megatron.run.commands import CommandEnd
from astar_megatron.run.prepare import Inputs
from astar_megatron.run.spending import Cost, generation_flops
from astar_megatron.run.tracking import read_stage_1_seconds
from astar_megatron.studies import comparison
from astar_megatron.studies.comparison import Budget, Run, Stage1Cost
from astar_megatron.studies.comparison_files import STAGE_1

type Lengths = Sequence[Sequence[int]]  # of each prompt's responses, in tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedStage1:
    """Stage 1 of runs that share a V* table and `inputs`; `folder` is the comparison's, `limit` its largest budget."""

    limit: Budget
    inputs: Inputs
    folder: Path

    def known_costs(self, configs: Mapping[Run, RunConfig]) -> dict[str, Stage1Cost]:
        """Return by method what stage 1 has cost where its table lacks nothing; writes nothing.

        Raises ValueError where the budget can't be kept by a method whose table lacks something.
        """
        costs = {}
        for method, cfg in _readers(configs).items():
            drawn, lacking = self._lengths(cfg)
            if lacking:
                self._check(cfg, drawn, lacking)
            else:
                costs[method] = self._cost(cfg, drawn)
        return costs

    def fill(
        self,
        configs: Mapping[Run, RunConfig],
        seed: int,
        finished: Iterable[Run],
        sweep: Callable[[RunConfig], CommandEnd],
    ) -> tuple[dict[str, Stage1Cost], dict[str, str]]:
        """Fill the table as each method reads it, and return by method what that cost, or why it could not be filled.

        Nothing of a method that does not read it. `sweep` runs stage 1 of a configuration, which gets `seed`. Raises
        ValueError where the budget can't be kept, and where what a run of `finished` has cost is not known.
        """
        costs, failures = {}, {}
        for method, cfg in _readers(configs).items():
            drawn, lacking = self._lengths(cfg)
            if lacking and failures:  # of the same table
                failures[method] = next(iter(failures.values()))
            elif lacking:
                self._check(cfg, drawn, lacking)
                end = sweep(cfg.model_copy(update={"run_dir": str(self.folder / STAGE_1), "seed": seed}))
                drawn, lacking = self._lengths(cfg)
                if end.status:
                    reason = f"stage 1 failed: {end.error}; run the same command again: it keeps what was drawn"
                    failures[method] = reason
                elif lacking:
                    failures[method] = f"stage 1 left {lacking} samples undrawn; run the same command again"
            if method not in failures:
                costs[method] = self._cost(cfg, drawn)
        if lost := [run for run in finished if run.cell in failures]:
            raise ValueError(f"{failures[lost[0].cell]} {lost[0].name} has finished, and what it cost is not known")
        return costs, failures

    def _lengths(self, cfg: RunConfig) -> tuple[Lengths, int]:
        return run_lengths(cfg, self.inputs.contract, self.inputs.prompts)

    def _check(self, cfg: RunConfig, drawn: Lengths, lacking: int) -> None:
        """Raise ValueError for what is known of the cost before the sweep: each response has a token at least."""
        shortest = min(self.inputs.prompts, key=lambda prompt: len(prompt.token_ids))
        undrawn = Cost(tokens=lacking, flops=generation_flops(self.inputs.model, [(shortest, [1] * lacking)]))
        comparison.check_least(cfg, self.limit, self._drawing(drawn) + undrawn)
        comparison.check_seconds(cfg, self.limit, self._seconds(cfg, drawn))

    def _cost(self, cfg: RunConfig, drawn: Lengths) -> Stage1Cost:
        cost = self._drawing(drawn)
        return Stage1Cost(tokens=cost.tokens, flops=cost.flops, seconds=self._seconds(cfg, drawn))

    def _drawing(self, drawn: Lengths) -> Cost:
        flops = generation_flops(self.inputs.model, zip(self.inputs.prompts, drawn, strict=True))
        return Cost(tokens=sum(map(sum, drawn)), flops=flops)

    def _seconds(self, cfg: RunConfig, drawn: Lengths) -> float | None:
        return read_stage_1_seconds(self.folder / STAGE_1, cfg.table_dir, sum(map(len, drawn)))


def _readers(configs: Mapping[Run, RunConfig]) -> dict[str, RunConfig]:
    """A configuration of each method that reads stage 1."""
    return {run.cell: cfg for run, cfg in configs.items() if cfg.asks_stage_1}
