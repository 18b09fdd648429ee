"""What policy and engines take of GPUs that they share; a run that does not fit is refused with the figures."""

import math
import re
from pathlib import Path

import pytest
from benchmarks.gpu_models import SHAPES
from samples import run_config

from astar_megatron import config
from astar_megatron.run import accelerators
from astar_megatron.run.accelerators import CONTEXT_BYTES, HEAD_BYTES
from astar_megatron.run.resources import GIB, ResourceError
from conversion.families import model_from_config
from conversion.tiles import ParallelLayout

QWEN2_1_5B = model_from_config(SHAPES["1.5b"])
CONFIGS = Path(__file__).resolve().parents[1] / "configs"
H100_BYTES = int(79.1 * GIB)  # what the driver of one of 80 GB leaves


def test_the_shares_are_stated_and_leave_room_for_the_processes() -> None:
    cfg = run_config(rollout={"gpu_memory_utilization": 0.25})
    shares = accelerators.shares_of(cfg, QWEN2_1_5B, 140 * GIB)
    assert shares.policy + CONTEXT_BYTES == shares.total == 140 * GIB
    assert shares.policy_share == pytest.approx((140 - 2) / 140)
    words = shares.describe()
    assert "the engine takes 35.0 GiB" in words and "of at most 138.0 GiB" in words and "\n" not in words


def test_the_policys_need_is_what_a_gpu_measured() -> None:
    """60.4 GiB at the peak of a step of Qwen2.5-1.5B's shape in packs of 16,384 tokens, on an H200."""
    assert accelerators.rank_bytes(run_config(), QWEN2_1_5B).most / GIB == pytest.approx(60.4, rel=0.06)


def test_bytes_of_the_policy_are_the_formulas() -> None:
    parameters, tokens = QWEN2_1_5B.num_parameters(), 1 << 15
    cfg = run_config(train={"micro_batch_tokens": tokens})
    kept = 28 * (4 * 1536 + 2 * (12 + 2) * 128 + 3 * 8960)
    assert accelerators.rank_bytes(cfg, QWEN2_1_5B).most == 20 * parameters + 2 * tokens * kept + HEAD_BYTES
    critic = run_config(train={"micro_batch_tokens": tokens}, objective={"name": "ppo"})
    assert accelerators.rank_bytes(critic, QWEN2_1_5B).most == 38 * parameters + 2 * tokens * kept + HEAD_BYTES
    less = run_config(
        train={"micro_batch_tokens": tokens},
        optim={"offload": True},
        model={"reference": "offload"},
        parallel={"recompute": "full"},
    )
    kept = 28 * 1536 + 4 * 1536 + 2 * (12 + 2) * 128 + 3 * 8960
    assert accelerators.rank_bytes(less, QWEN2_1_5B).most == 6 * parameters + 2 * tokens * kept + HEAD_BYTES


@pytest.mark.parametrize(
    ("shape", "more", "kept"),
    [("1.5b", {"num_key_value_heads": 4}, 2 * 2), ("0.6b", {"num_attention_heads": 32}, 3 * 16)],
    ids=["Qwen2.5", "Qwen3"],
)
def test_activations_of_attention_are_by_the_width_of_its_heads(shape: str, more: dict[str, int], kept: int) -> None:
    def numbers(**sizes: int) -> float:
        model, cfg = model_from_config(SHAPES[shape] | sizes), run_config()
        activations = accelerators.rank_bytes(cfg, model).activations
        return activations / 2 / accelerators.micro_batch_tokens(cfg) / model.num_layers

    assert numbers(**more) - numbers() == kept * 128


def test_a_sequence_longer_than_a_micro_batch_counts_whole() -> None:
    cfg = run_config(train={"micro_batch_tokens": 128})
    same = run_config(train={"micro_batch_tokens": cfg.max_tokens})
    assert accelerators.rank_bytes(cfg, QWEN2_1_5B) == accelerators.rank_bytes(same, QWEN2_1_5B)


def test_a_run_is_not_refused_for_packs_that_its_mini_batch_can_not_fill() -> None:
    train = {"batch_size": 8, "mini_batch_size": 8, "micro_batch_tokens": 65536, "offload": "optimizer"}
    cfg = run_config(train=train, parallel={"data": 4}, rollout={"gpu_memory_utilization": 0.6})
    accelerators.shares_of(cfg, QWEN2_1_5B, H100_BYTES)
    same = run_config(train=train | {"micro_batch_tokens": 2 * cfg.max_tokens}, parallel={"data": 4})
    assert accelerators.rank_bytes(cfg, QWEN2_1_5B) == accelerators.rank_bytes(same, QWEN2_1_5B)


def test_what_is_kept_while_engines_generate_follows_the_key() -> None:
    parameters = QWEN2_1_5B.num_parameters()
    rank = accelerators.rank_bytes(run_config(objective={"name": "ppo"}), QWEN2_1_5B)
    assert rank.kept("none") == rank.most
    assert rank.kept("cache") == 38 * parameters
    assert rank.kept("optimizer") == (38 - 2 * 12) * parameters
    assert rank.kept("all") == 2 * parameters


def test_copies_of_weights_in_fp8_count_while_a_rank_steps_alone() -> None:
    (plain, fp8) = (
        accelerators.rank_bytes(run_config(model={"fp8": recipe}), QWEN2_1_5B) for recipe in (None, "tensorwise")
    )
    assert fp8.most - plain.most == 2 * QWEN2_1_5B.num_parameters()
    assert fp8.kept("cache") == plain.kept("cache") and fp8.kept("none") == fp8.most


def test_a_run_is_refused_one_byte_below_what_its_policy_needs() -> None:
    cfg = run_config(rollout={"gpu_memory_utilization": 0.1}, train={"offload": "all"})
    enough = accelerators.rank_bytes(cfg, QWEN2_1_5B).most + CONTEXT_BYTES
    accelerators.shares_of(cfg, QWEN2_1_5B, enough)
    with pytest.raises(ResourceError, match=r"a policy rank needs about 6\d\.\d GiB to step.*train\.micro_batch"):
        accelerators.shares_of(cfg, QWEN2_1_5B, enough - 1)


def test_a_run_is_refused_one_byte_below_what_its_policy_keeps_beside_the_engine() -> None:
    cfg = run_config(
        rollout={"gpu_memory_utilization": 0.75},
        train={"offload": "optimizer", "micro_batch_tokens": 4096},
        sampling={"max_response_tokens": 1024},
    )
    enough = 4 * (accelerators.rank_bytes(cfg, QWEN2_1_5B).kept("optimizer") + CONTEXT_BYTES)
    accelerators.shares_of(cfg, QWEN2_1_5B, enough)
    with pytest.raises(
        ResourceError, match=r"keeps about 1\d\.\d GiB while the engine.*train\.offload=optimizer or all"
    ):
        accelerators.shares_of(cfg, QWEN2_1_5B, enough - 4)


def test_an_engine_that_can_not_hold_its_weights_is_refused_by_its_key() -> None:
    cfg = run_config(rollout={"gpu_memory_utilization": 0.02})
    with pytest.raises(ResourceError, match=r"^rollout\.gpu_memory_utilization: 0\.02 of .* are 1\.6 GiB.*raise it"):
        accelerators.shares_of(cfg, QWEN2_1_5B, 80 * GIB)


def test_the_demo_fits_a_small_gpu() -> None:
    cfg = config.load(Path(__file__).parents[1] / "configs/demo.yaml")
    accelerators.shares_of(cfg, model_from_config(SHAPES["smollm2"]), 16 * GIB)


def test_ranks_that_share_a_model_and_workers_that_share_an_engine_need_less() -> None:
    tokens = 1 << 15
    parallel = {"tensor": 2, "pipeline": 2, "context": 2, "data": 2}
    cfg = run_config(train={"micro_batch_tokens": tokens}, parallel=parallel, rollout={"tensor": 2})
    kept = 28 * (4 * 1536 + 2 * (12 + 2) * 128 + 3 * 8960)
    own = sum(
        map(math.prod, QWEN2_1_5B.megatron_shapes(ParallelLayout(tensor=2, pipeline=2, context=2, data=2), 15).values())
    )
    weights = 6 * own + 12 * (own // 4) + 2 * own  # with gradients; Adam over 4 replicas; reference
    assert accelerators.rank_bytes(cfg, QWEN2_1_5B).most == weights + 2 * tokens * kept // 4 + HEAD_BYTES


def activations(stage: int | None, batch_size: int = 64, **parallel: int) -> int:
    train = {"batch_size": batch_size, "mini_batch_size": batch_size, "micro_batch_tokens": 1}
    return accelerators.rank_bytes(run_config(train=train, parallel=parallel), QWEN2_1_5B, stage).activations


@pytest.mark.parametrize("virtual", [1, 7])
def test_a_stage_keeps_the_micro_batches_that_megatrons_schedule_has_under_way(virtual: int) -> None:
    alone, sizes = activations(0), {"pipeline": 4, "virtual": virtual}
    warm_ups = [3, 2, 1, 0] if virtual == 1 else [24 + 6, 24 + 4, 24 + 2, 24]  # before one is back
    expected = [(warm_up + 1) / (4 * virtual) * alone for warm_up in warm_ups]
    assert [activations(stage, **sizes) for stage in range(4)] == pytest.approx(expected)
    assert expected[0] == pytest.approx((1 if virtual == 1 else 1 + 3 / 28) * alone)
    assert activations(None, **sizes) == activations(0, **sizes)  # shared GPUs are judged by
    assert activations(0, batch_size=4, **sizes) == alone  # no more than the mini-batch has
    if virtual == 1:
        assert activations(0, batch_size=2, **sizes) == activations(1, batch_size=2, **sizes) == alone // 2


def test_workers_of_an_engine_share_heads_and_beyond_the_heads_there_are_each_has_one() -> None:
    for tensor, heads in ((1, 2), (2, 1), (4, 1)):
        cfg = run_config(rollout={"tensor": tensor})
        cache = 2 * 28 * heads * 128 * cfg.max_tokens
        weights = sum(map(math.prod, QWEN2_1_5B.vllm_shapes(tensor, 0).values()))
        assert accelerators.engine_needs(cfg, QWEN2_1_5B) == 2 * (weights + cache)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*_qwen2.5_*.yaml")), ids=lambda path: path.stem)
def test_the_papers_runs_fit_gpus_of_80_gb(path: Path) -> None:
    cfg, size = config.load(path), path.stem.removesuffix("_2x8").rpartition("_")[2]
    if cfg.cluster.share_gpus:
        accelerators.shares_of(cfg, model_from_config(SHAPES[size]), H100_BYTES)
    else:
        check_apart(cfg, size)


def check_apart(cfg: config.RunConfig, size: str) -> None:
    model = model_from_config(SHAPES[size])
    assert accelerators.rank_bytes(cfg, model).most + CONTEXT_BYTES < H100_BYTES
    assert accelerators.engine_needs(cfg, model) < H100_BYTES * cfg.rollout.gpu_memory_utilization


def test_the_papers_runs_fit_two_gpus_a_side_as_the_page_says() -> None:
    page = (CONFIGS / "README.md").read_text(encoding="utf-8").replace("\\\n", "")
    commands = re.findall(r"astar launch --dry-run --config configs/(\w+_qwen2\.5_)\S+\.yaml (.*)", page)
    assert len(commands) == 2
    for (stem, words), sizes in zip(commands, (("1.5b", "3b"), ("7b",)), strict=True):
        for size in sizes:
            cfg = config.load(CONFIGS / f"{stem}{size}.yaml", re.findall(r"--set (\S+)", words))
            assert cfg.cluster.share_gpus is False
            assert (cfg.parallel.world_size, cfg.rollout.num_engines * cfg.rollout.tensor) == (2, 2)
            check_apart(cfg, size)
