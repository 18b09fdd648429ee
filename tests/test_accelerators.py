"""What policy and engines take of GPUs that they share; a run that does not fit is refused with the figures."""

from pathlib import Path

import pytest
from benchmarks.gpu_models import SHAPES
from samples import run_config

from astar_megatron import config
from astar_megatron.run import accelerators
from astar_megatron.run.accelerators import CONTEXT_BYTES, HEAD_BYTES
from astar_megatron.run.resources import GIB, ResourceError
from conversion.families import model_from_config

QWEN2_1_5B = model_from_config(SHAPES["1.5b"])


def test_the_shares_are_stated_and_leave_room_for_the_processes() -> None:
    cfg = run_config(rollout={"gpu_memory_utilization": 0.25})
    shares = accelerators.shares_of(cfg, QWEN2_1_5B, 140 * GIB)
    assert shares.engine + shares.policy + CONTEXT_BYTES == shares.total == 140 * GIB
    assert shares.policy_share == pytest.approx((140 - 35 - 2) / 140)
    words = shares.describe()
    assert "the engine takes 35.0 GiB" in words and "a policy rank at most 103.0 GiB" in words and "\n" not in words


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
    enough = 2 * (need + CONTEXT_BYTES)
    accelerators.shares_of(cfg, QWEN2_1_5B, enough)
    with pytest.raises(ResourceError, match=r"a policy rank needs about 6\d\.\d GiB.*lower that, train\.micro_batch"):
        accelerators.shares_of(cfg, QWEN2_1_5B, enough - 2)


def test_an_engine_that_can_not_hold_its_weights_is_refused_by_its_key() -> None:
    cfg = run_config(rollout={"gpu_memory_utilization": 0.02})
    with pytest.raises(ResourceError, match=r"^rollout\.gpu_memory_utilization: 0\.02 of .* are 1\.6 GiB.*raise it"):
        accelerators.shares_of(cfg, QWEN2_1_5B, 80 * GIB)


def test_the_demo_fits_a_small_gpu() -> None:
    cfg = config.load(Path(__file__).parents[1] / "configs/demo.yaml")
    accelerators.shares_of(cfg, model_from_config(SHAPES["smollm2"]), 16 * GIB)


def test_ranks_that_share_a_model_and_workers_that_share_an_engine_need_less() -> None:
    tokens, size = 1 << 15, QWEN2_1_5B.num_parameters()
    parallel = {"tensor": 2, "pipeline": 2, "context": 2, "data": 2}
    cfg = run_config(train={"micro_batch_tokens": tokens}, parallel=parallel, rollout={"tensor": 2})
    kept = 28 * (7 * 1536 + 3 * 8960)
    weights = (
        6 * (size // 4) + 12 * (size // 4) // 4 + 2 * (size // 4)
    )  # with gradients; Adam over 4 replicas; reference
    assert accelerators.policy_needs(cfg, QWEN2_1_5B) == weights + 2 * tokens * kept // 4 + HEAD_BYTES
    assert accelerators.engine_needs(cfg, QWEN2_1_5B) == accelerators.engine_needs(run_config(), QWEN2_1_5B) // 2
