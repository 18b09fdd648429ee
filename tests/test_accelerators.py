"""Who gets which accelerators, and that a run which does not fit the only one is refused with the figures."""

import dataclasses
from pathlib import Path

import pytest
from benchmarks.gpu_models import SHAPES
from samples import run_config

from astar_megatron import config
from astar_megatron.run import accelerators
from astar_megatron.run.accelerators import CONTEXT_BYTES, HEAD_BYTES
from astar_megatron.run.resources import GIB, Machine, ResourceError
from conversion.families import model_from_config

QWEN2_1_5B = model_from_config(SHAPES["1.5b"])


def machine(gib: int, count: int = 1) -> Machine:
    return Machine(
        memory_bytes=64 * GIB,
        shared_bytes=8 * GIB,
        native_bfloat16=True,
        num_accelerators=count,
        accelerator_bytes=gib * GIB,
    )


def test_ranks_have_the_accelerators_that_engines_leave() -> None:
    cfg = run_config(rollout={"num_engines": 2, "tensor": 3})
    places, reason = accelerators.free_accelerators(cfg, 8)
    assert places == 2 and "of 8 accelerators the engines take 6" in reason
    assert accelerators.free_accelerators(cfg, 4)[0] == -2


def test_one_rank_and_one_engine_share_the_only_accelerator() -> None:
    places, reason = accelerators.free_accelerators(run_config(), 1)
    assert (places, reason) == (1, "the rank and the engine share the only accelerator")
    assert accelerators.free_accelerators(run_config(), 2)[0] == 1


@pytest.mark.parametrize(
    "more",
    [
        {"parallel": {"data": 2}, "train": {"batch_size": 4}},
        {"rollout": {"num_engines": 2}},
        {"rollout": {"tensor": 2}},
        {"cluster": {"address": "10.0.0.1:6379"}},
    ],
)
def test_nobody_else_shares_it(more: dict) -> None:
    cfg = run_config(**more)
    assert not accelerators.are_shared(cfg, 1)
    assert accelerators.free_accelerators(cfg, 1)[0] <= 0
    assert accelerators.shares_of(cfg, QWEN2_1_5B, machine(141)) is None
    for several in (machine(80, count=2), machine(0, count=0)):  # there each has its own
        assert accelerators.shares_of(run_config(), QWEN2_1_5B, several) is None


def test_the_shares_are_stated_and_leave_room_for_the_processes() -> None:
    cfg = run_config(rollout={"gpu_memory_utilization": 0.25})
    shares = accelerators.shares_of(cfg, QWEN2_1_5B, machine(140))
    assert shares is not None
    assert shares.engine + shares.policy + CONTEXT_BYTES == shares.total == 140 * GIB
    assert shares.policy_share == pytest.approx((140 - 35 - 2) / 140)
    words = shares.describe()
    assert "the engine takes 35.0 GiB" in words and "the policy at most 103.0 GiB" in words and "\n" not in words


def test_the_policys_need_is_what_a_gpu_measured() -> None:
    """60.4 GiB at the peak of a step of Qwen2.5-1.5B's shape in packs of 16,384 tokens, on an H200."""
    assert accelerators.policy_needs(run_config(), QWEN2_1_5B) / GIB == pytest.approx(60.4, rel=0.06)


def test_bytes_of_the_policy_are_the_formulas() -> None:
    parameters, tokens = QWEN2_1_5B.num_parameters(), 1 << 15
    cfg = run_config(train={"micro_batch_tokens": tokens})
    kept = 28 * (7 * 1536 + 3 * 8960)
    assert accelerators.policy_needs(cfg, QWEN2_1_5B) == 20 * parameters + 2 * tokens * kept + HEAD_BYTES
    critic = run_config(train={"micro_batch_tokens": tokens}, objective={"name": "ppo"})
    assert accelerators.policy_needs(critic, QWEN2_1_5B) == 38 * parameters + 2 * tokens * kept + HEAD_BYTES
    less = run_config(
        train={"micro_batch_tokens": tokens},
        optim={"offload": True},
        model={"reference": "offload"},
        parallel={"recompute": "full"},
    )
    kept = 28 * 1536 + 7 * 1536 + 3 * 8960
    assert accelerators.policy_needs(less, QWEN2_1_5B) == 6 * parameters + 2 * tokens * kept + HEAD_BYTES


def test_a_sequence_longer_than_a_micro_batch_counts_whole() -> None:
    cfg = run_config(train={"micro_batch_tokens": 128})
    assert accelerators.policy_needs(cfg, QWEN2_1_5B) == accelerators.policy_needs(
        run_config(train={"micro_batch_tokens": cfg.max_tokens}), QWEN2_1_5B
    )


def test_a_run_is_refused_one_byte_below_what_its_policy_needs() -> None:
    cfg = run_config(rollout={"gpu_memory_utilization": 0.5})
    need = accelerators.policy_needs(cfg, QWEN2_1_5B)
    enough = dataclasses.replace(machine(0), accelerator_bytes=2 * (need + CONTEXT_BYTES))
    assert accelerators.shares_of(cfg, QWEN2_1_5B, enough) is not None
    with pytest.raises(ResourceError, match=r"the policy needs about 6\d\.\d GiB.*lower that, train\.micro_batch"):
        accelerators.shares_of(
            cfg, QWEN2_1_5B, dataclasses.replace(enough, accelerator_bytes=2 * (need + CONTEXT_BYTES) - 2)
        )


def test_an_engine_that_can_not_hold_its_weights_is_refused_by_its_key() -> None:
    cfg = run_config(rollout={"gpu_memory_utilization": 0.02})
    with pytest.raises(ResourceError, match=r"^rollout\.gpu_memory_utilization: 0\.02 of .* are 1\.6 GiB.*raise it"):
        accelerators.shares_of(cfg, QWEN2_1_5B, machine(80))


def test_the_demo_fits_a_small_gpu() -> None:
    cfg = config.load(Path(__file__).parents[1] / "configs/demo.yaml")
    assert accelerators.shares_of(cfg, model_from_config(SHAPES["smollm2"]), machine(16)) is not None
