"""The settings that `astar plan` offers where a run does not fit: they fit, and no launch refuses them."""

import json

import pytest
import yaml
from benchmarks.gpu_models import SHAPES
from samples import run_config
from test_plan import H100, QWEN

from astar_megatron import config
from astar_megatron.launch.stages import jobs_of
from astar_megatron.model import gpus
from astar_megatron.planning.forecast import forecast
from astar_megatron.planning.nearest import nearest
from conversion.families import model_from_config


def test_smaller_packs_that_are_offered_are_smaller_than_those_that_there_are() -> None:
    key, train = "train.micro_batch_tokens", {"batch_size": 24, "micro_batch_tokens": 1 << 20}
    cfg = run_config(train=train, slurm={"gpus_per_node": 2}, cluster={"share_gpus": False})
    assert not forecast(cfg, QWEN, H100, None).fits
    (size,) = (near.change[key] for near in nearest(cfg, QWEN, H100, None) if key in near.change)
    assert cfg.max_tokens <= size <= 12 * cfg.max_tokens


def test_settings_that_are_offered_fit_cheapest_first_and_change_no_more_than_needed() -> None:
    cfg = run_config(train={"micro_batch_tokens": 32768}, cluster={"share_gpus": True})
    assert not forecast(cfg, QWEN, H100, None).fits
    offered = nearest(cfg, QWEN, H100, None)
    assert 1 <= len(offered) <= 3
    tree = cfg.model_dump()
    for near in offered:
        words = near.describe().replace("--set ", "").split()
        changed = json.loads(json.dumps(tree))
        for word in words:
            key, _, value = word.partition("=")
            section, name = key.split(".")
            changed[section][name] = yaml.safe_load(value)
        assert forecast(config.validate(changed), QWEN, H100, None).fits
    assert [near.forecast.training_hours for near in offered] == sorted(n.forecast.training_hours for n in offered)
    assert all(len(near.change) == 1 for near in offered)


def test_engines_that_draw_ahead_on_shared_gpus_are_offered_not_to() -> None:
    cfg = run_config(cluster={"share_gpus": True}, objective={"name": "oapl"}, rollout={"max_staleness": 2})
    assert nearest(cfg, QWEN, H100, None)[0].change == {"rollout.max_staleness": 0}


@pytest.mark.parametrize("packs", [1024, 65536], ids=["fits", "too-large"])
def test_nodes_without_work_are_told_as_by_launch_and_never_offered(packs: int) -> None:
    train = {"batch_size": 512, "micro_batch_tokens": packs}
    cfg = run_config(parallel={"data": 8}, train=train, slurm={"nodes": 6, "gpus_per_node": 8})
    idle = next(problem for problem in forecast(cfg, QWEN, H100, None).problems if "slurm" in problem)
    assert idle.startswith("slurm.nodes: 6, of which 4 would have nothing to do: 8 policy ranks and 1 engine on ")
    with pytest.raises(ValueError) as refusal:
        jobs_of(cfg, "run.yaml")
    assert str(refusal.value) == idle
    offered = nearest(cfg, QWEN, H100, None)
    assert offered and (packs > 1024 or [near.change for near in offered] == [{"slurm.nodes": 2}])
    for near in offered:
        jobs_of(config.validate(config.with_values(cfg.model_dump(), near.change)), "run.yaml")


def test_fp8_on_a_gpu_without_it_is_refused_and_none_is_offered() -> None:
    cfg = run_config(model={"fp8": "blockwise"}, train={"micro_batch_tokens": 1024})
    assert forecast(cfg, QWEN, H100, None).fits
    a100 = gpus.named("A100")
    (problem,) = forecast(cfg, QWEN, a100, None).problems
    assert problem.startswith("model.fp8=blockwise: ") and problem.endswith("this GPU has 8.0; set model.fp8=null")
    offered = nearest(cfg, QWEN, a100, None)
    assert [near.describe() for near in offered] == ["--set model.fp8=null"]


def test_a_model_that_needs_tensor_and_pipeline_at_once_is_offered_both() -> None:
    large = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    llama = model_from_config(SHAPES["smollm2"] | large | {"num_key_value_heads": 8, "vocab_size": 128256})
    apart = {"parallel": {"data": 8}, "rollout": {"num_engines": 8}}
    cfg = run_config(**apart, cluster={"share_gpus": True}, slurm={"nodes": 8, "gpus_per_node": 8})
    near = nearest(cfg, llama, H100, None)[0]
    assert {key: near.change[key] for key in ("parallel.tensor", "rollout.tensor", "rollout.num_engines")} == {
        "parallel.tensor": 8, "rollout.tensor": 8, "rollout.num_engines": 8
    }  # fmt: skip
    assert near.change["parallel.pipeline"] * near.change["parallel.data"] == 8 and near.forecast.num_gpus == 64


def test_where_nothing_near_fits_nothing_is_offered() -> None:
    huge = model_from_config(SHAPES["7b"] | {"hidden_size": 28672, "intermediate_size": 151552})
    assert nearest(run_config(), huge, gpus.named("A10"), None) == []
