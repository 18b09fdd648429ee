"""What a step leaves in metrics.jsonl, and the end of a run that loses too many steps."""

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import samples
import torch
from samples import STATS

from astar_megatron.algorithm.astar import Astar
from astar_megatron.algorithm.refresh import LiveVStar
from astar_megatron.config import AstarConfig, RunConfig
from astar_megatron.data.v_star import MissingTableError
from astar_megatron.run import steps, training
from astar_megatron.types import Prompt

# Every key of a line. A change here is a change of what people's plots read: it belongs in CHANGELOG.md, and in
# the table of astar_megatron/README.md.
KEYS = {
    *("step", "version", "reward_mean", "v_star_mean", "loss", "grad_norm", "lr", "skipped_steps"),
    *("logratio_mean", "logratio_std", "logratio_p05", "logratio_p50", "logratio_p95", "logratio_max"),
    *("kl_sequence", "kl_token", "entropy", "residual_mean", "residual_std", "slope", "r_squared"),
    *("engine_gap", "engine_gap_max", "truncated", "tokens", "response_tokens", "tokens_per_second"),
    *("model_flops", "mfu"),
    *("peak_memory_bytes", "seconds", "v_star_shift", "spent_tokens", "changed_weights", "unstable_share"),
    *("staleness_mean", "staleness_max", "older_tokens"),
}
KEYS_OF_OTHER_METHODS = {
    *("flat_groups", "value_mean", "value_error", "weight_mean", "effective_share"),
    *("critic_loss", "critic_grad_norm", "critic_skipped_steps"),
}
PROMPT = Prompt(uid="a", token_ids=(1, 2), text="What is 1 + 1?", answer="2")
ROLLOUT = samples.rollout(PROMPT, truncated=True, first_version=3, last_version=3)
OBJECTIVE = Astar(AstarConfig(), LiveVStar({"a": 0.5}, {"a": 4}, 0.5, None))


def test_the_keys_of_a_line_of_metrics_are_frozen() -> None:
    health = steps.health_of(OBJECTIVE, [ROLLOUT], steps.batch_of([ROLLOUT], OBJECTIVE, 3), STATS, 1)
    line = steps.metrics_of(3, [ROLLOUT], health, STATS, 70, {"total": 2.0})
    assert set(line) == KEYS
    assert (line["spent_tokens"], line["v_star_shift"]) == (70, 0.0)
    assert (line["truncated"], line["skipped_steps"], line["lr"]) == (1.0, 1, 1e-6)
    assert line["peak_memory_bytes"] == [5, 6]
    assert line["seconds"] == {"policy": 0.4, "reference": 0.1, "total": 2.0, "ranks_idle": 1.5}
    assert (line["staleness_mean"], line["staleness_max"], line["older_tokens"]) == (0.0, 0, 0.0)
    assert (line["logratio_mean"], line["logratio_max"], line["engine_gap"]) == (1.0, 1.0, 0.5)


def test_too_many_skipped_steps_end_the_run_naming_where_to_look() -> None:
    steps.check_skipped(2, 3, Path("runs/x"))
    with pytest.raises(steps.NotFiniteError, match=r"not finite 3 times.*runs/x/bad_batches.*optim\.lr"):
        steps.check_skipped(3, 3, Path("runs/x"))


def test_steps_of_a_critic_that_were_left_out_count_too() -> None:
    assert steps.skipped_of({"skipped_steps": 1, "critic_skipped_steps": 2.0}) == 3
    assert steps.skipped_of({}) == 0


def test_a_rollout_that_could_not_be_scored_counts_0() -> None:
    failed = dataclasses.replace(ROLLOUT, reward=None)
    assert steps.batch_of([ROLLOUT, failed], OBJECTIVE, version=3).columns["reward"].tolist() == [1.0, 0.0]
    assert steps.metrics_of(3, [ROLLOUT, failed], {}, STATS, 70, {"total": 2.0})["reward_mean"] == 0.5


def test_the_age_of_rollouts_is_counted_by_response_and_by_token() -> None:
    across = dataclasses.replace(ROLLOUT, first_version=1, last_version=3, tokens_by_version=(1, 0, 1))
    assert steps.staleness(3, [ROLLOUT, across]) == {"staleness_mean": 1.0, "staleness_max": 2, "older_tokens": 0.25}
    assert steps.staleness(5, [ROLLOUT, across])["older_tokens"] == 1.0
    batch = steps.batch_of([across], OBJECTIVE, 3)
    assert math.isnan(steps.health_of(OBJECTIVE, [across], batch, STATS, 1)["engine_gap"])  # other weights drew


def test_gaps_of_engines_that_cancel_are_seen() -> None:
    stats = dataclasses.replace(STATS, logprobs=(-1.0, -5.0), reference_logprobs=(-1.0, -1.0))
    drawn = [dataclasses.replace(ROLLOUT, token_logprobs=(-3.0, 0.0))] * 2
    health = steps.health_of(OBJECTIVE, drawn, steps.batch_of(drawn, OBJECTIVE, 3), stats, 2)
    assert (health["engine_gap"], health["engine_gap_max"]) == (0.0, 2.0)
    stats = dataclasses.replace(stats, logprobs=(-1.0, math.nan))
    health = steps.health_of(OBJECTIVE, drawn, steps.batch_of(drawn, OBJECTIVE, 3), stats, 2)
    assert math.isnan(health["engine_gap"]) and math.isnan(health["engine_gap_max"])


def test_a_batch_holds_the_sum_of_what_its_rollouts_hold() -> None:
    batch = steps.batch_of([ROLLOUT], OBJECTIVE, version=3)
    assert batch.response_lengths().tolist() == [2]
    assert batch.response_tokens() == 2
    assert torch.equal(batch.columns["v_star"], torch.tensor([0.5], dtype=torch.float64))


def test_only_methods_and_filters_that_read_stage_1_ask_for_its_table(tmp_path: Path) -> None:
    def inputs(**sections: Any) -> tuple[RunConfig, Any]:
        cfg = samples.run_config(sweep={"table": str(tmp_path / "none")}, **sections)
        return cfg, SimpleNamespace(contract=samples.CONTRACT, prompts=[PROMPT])

    for sections in (
        *({"objective": {"name": name}} for name in ("grpo", "rebel", "ppo", "oapl")),
        {"objective": {"name": "oapl"}, "oapl": {"refresh_steps": 3}},
    ):
        assert training.stage_1(*inputs(**sections)) is None
    for sections in (
        {},
        {"objective": {"name": "spo"}},
        {"objective": {"name": "oapl"}, "oapl": {"value": "table"}},
        {"objective": {"name": "grpo"}, "filter": {"all_wrong": 0.5}},
    ):
        with pytest.raises(MissingTableError, match="astar sweep"):
            training.stage_1(*inputs(**sections))
