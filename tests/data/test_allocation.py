"""Which samples of a V* table are a run's, and what is said where the table has more or lacks some."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import samples
from samples import CONTRACT

from astar_megatron.config import RunConfig
from astar_megatron.data.allocation import run_estimates, samples_wanted
from astar_megatron.data.v_star import MissingTableError, VStarTable
from astar_megatron.types import Prompt

PROMPTS = [Prompt(uid=f"{i:032x}", token_ids=(1,), text="q", answer=str(i)) for i in range(20)]


def run(folder: Path, **sections: Any) -> RunConfig:
    return samples.run_config(**{"sweep": {}, **sections, "run_dir": str(folder)})


def swept(cfg: RunConfig) -> VStarTable:
    """The table as `astar sweep` leaves it, of prompts from never solved to always solved."""
    table, chance = VStarTable.create_or_open(cfg.table_dir, CONTRACT), np.random.default_rng(0)
    while missing := table.missing(PROMPTS, samples_wanted(table, PROMPTS, cfg.sweep, cfg.beta1)):
        table.append(
            [
                samples.rollout(prompt, sample=n, reward=float(chance.random() * len(PROMPTS) < int(prompt.answer)))
                for prompt, n in missing
            ]
        )
    return table


def test_training_says_that_the_table_has_more_samples_than_v_star_is_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    all_cfg = run(tmp_path, sweep={"num_samples": 16})
    swept(all_cfg)
    assert set(run_estimates(all_cfg, CONTRACT, PROMPTS).samples) == {16} and not caplog.records
    assert set(run_estimates(run(tmp_path), CONTRACT, PROMPTS).samples) == {8}
    (warning,) = caplog.messages
    assert warning == "V* is of 8 of the 16 samples a prompt that the table has; set sweep.num_samples=16 to use all"


def test_training_without_the_sweeps_extra_tokens_says_what_it_leaves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = run(tmp_path, sweep={"extra_tokens": 200})
    drawn = swept(cfg).summary().samples
    assert run_estimates(cfg, CONTRACT, PROMPTS).samples.sum() == drawn and not caplog.records
    run_estimates(run(tmp_path), CONTRACT, PROMPTS)
    (warning,) = caplog.messages
    assert f"V* is of 160 of the {drawn} samples" in warning and "sweep.extra_tokens as for the sweep" in warning


def test_a_table_of_extra_tokens_that_lacks_samples_at_another_beta1_names_it(tmp_path: Path) -> None:
    sweep = {"extra_tokens": 200}
    swept(run(tmp_path, sweep=sweep))
    with pytest.raises(MissingTableError, match=r"depends on beta1, which is 8 here: set the sweep's"):
        run_estimates(run(tmp_path, sweep=sweep, astar={"beta1": 8.0}), CONTRACT, PROMPTS)
    run_estimates(run(tmp_path, astar={"beta1": 8.0}), CONTRACT, PROMPTS)
    for sweep in ({"num_samples": 99}, {"num_samples": 99, "extra_tokens": 200}):  # of those that all prompts get
        with pytest.raises(MissingTableError) as caught:
            run_estimates(run(tmp_path, sweep=sweep), CONTRACT, PROMPTS)
        assert "beta1" not in str(caught.value)
