"""What a plan and this machine's check say that ranks hold is what built ranks hold."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import state_ranks
from ranks import Job
from samples import run_config

from astar_megatron.run.rank_state import state_of_all, state_of_rank
from conversion.families import read_model

PADDING = 0.013  # of such tiny tensors, which Megatron aligns in its buffers; and a critic's own head
SPLIT = {"tensor": 2, "pipeline": 2}
PPO = {"objective": {"name": "ppo"}}


@pytest.fixture
def models(tied_llama: Path, untied_qwen2: Path, tiny_family: Callable[..., Path]) -> dict[str, Path]:
    return {"tied": tied_llama, "untied": untied_qwen2, "experts": tiny_family("qwen3_moe")}


@pytest.mark.parametrize(
    ("name", "axes", "dtype", "sections"),
    [
        ("tied", {}, "float32", {}),
        ("tied", SPLIT, "float32", {}),
        ("tied", SPLIT, "bfloat16", {}),
        ("tied", {"pipeline": 2, "virtual": 3, "data": 2}, "bfloat16", {}),
        ("untied", SPLIT, "bfloat16", {}),
        ("tied", {"pipeline": 2, "data": 2}, "bfloat16", PPO),
        ("experts", {"tensor": 2, "data": 2, "expert": 2}, "bfloat16", {}),
    ],
    ids=str,
)
def test_ranks_hold_what_is_planned(
    models: dict[str, Path], name: str, axes: dict[str, int], dtype: Any, sections: dict[str, Any], ranks: Any
) -> None:
    cfg = run_config(parallel=axes, model={"dtype": dtype}, **sections)
    model, size = read_model(models[name]), 2 if dtype == "bfloat16" else 4
    job = Job(str(models[name]), dtype=dtype, critic_lr=cfg.critic_lr, **axes)  # type: ignore[arg-type]
    built = ranks.run(state_ranks.state, job.world_size, job=job)
    own = job.world_size // job.pipeline
    for rank, parts in enumerate(built):
        planned = state_of_rank(cfg, model, size, rank // own)
        assert (parts["weights"], parts["reference"]) == (planned.weights, planned.reference)
        assert parts == pytest.approx(asdict(planned), rel=PADDING)
    weights = sum(parts["weights"] for parts in built)
    assert weights == state_of_all(cfg, model, size).weights
