"""`astar plan`: figures beside measured ones, what changes them, what it says where a run does not fit."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import plan_page
import pytest
import samples
import yaml
from benchmarks.gpu_models import SHAPES
from plan_page import Figure
from samples import run_config
from test_architecture import WITHOUT_A_LANE, python

from astar_megatron.config import RunConfig
from astar_megatron.model import gpus
from astar_megatron.model.layouts import LayoutError
from astar_megatron.planning import capacity, pace
from astar_megatron.planning.forecast import count_prompts, forecast
from astar_megatron.run import accelerators
from astar_megatron.run.resources import GIB
from conversion.families import model_from_config

H100, H200 = gpus.named("H100"), gpus.named("H200")
QWEN = model_from_config(SHAPES["1.5b"])
EXPERTS = model_from_config(
    SHAPES["0.6b"]
    | {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 8, "num_experts_per_tok": 2}
    | {"moe_intermediate_size": 768, "norm_topk_prob": True}
)


def step(cfg: RunConfig, *, shared: bool = False, num_nodes: int = 1) -> pace.StepSeconds:
    return pace.step_seconds(cfg, QWEN, H100, shared=shared, num_nodes=num_nodes)


# --- measured


@pytest.mark.parametrize("figure", plan_page.figures(), ids=lambda figure: figure.conditions)
def test_a_planned_figure_is_within_its_bound_of_the_measured_or_says_why_not(figure: Figure) -> None:
    assert (abs(figure.difference) <= figure.bound) == (not figure.outside), figure.row()


def test_the_table_of_the_guide_is_made_of_these_figures() -> None:
    text = plan_page.PAGE.read_text(encoding="utf-8")
    assert plan_page.page(text) == text, "run tests/plan_page.py"
    assert plan_page.page(text.replace("| GiB |", "| MiB |", 1)) == text
    with pytest.raises(ValueError, match="expected one table"):
        plan_page.page("no table")


def test_every_constant_that_a_figure_sets_is_a_constant() -> None:
    names = {figure.sets for figure in plan_page.figures()} - {""}
    assert names and all(hasattr(pace, name) or hasattr(capacity, name) for name in names)


# --- memory


def test_ranks_of_all_stages_hold_the_model_once_and_a_tied_head_twice() -> None:
    cfg = run_config(parallel={"pipeline": 2, "tensor": 2})
    first, last, _ = capacity.processes(cfg, QWEN, H100)
    assert (first.name, last.name, first.count) == ("policy rank 0 to 1", "policy rank 2 to 3", 2)
    embedding = 2 * SHAPES["1.5b"]["vocab_size"] * SHAPES["1.5b"]["hidden_size"]
    whole = 2 * (first.parts["weights"] + last.parts["weights"])
    assert whole == pytest.approx(2 * QWEN.num_parameters() + embedding, rel=1e-3)


def test_what_must_fit_leaves_out_what_an_allocator_would_give_back() -> None:
    rank = capacity.processes(run_config(), QWEN, H100)[0]
    exact = dataclasses.replace(rank, limit_bytes=rank.total_bytes - rank.parts["reserve"])
    assert rank.parts["reserve"] > 0 and exact.fits
    assert not dataclasses.replace(exact, limit_bytes=rank.total_bytes - rank.parts["reserve"] - 1).fits


def test_experts_that_ranks_share_take_less_of_each_and_their_optimiser_no_less() -> None:
    alike = accelerators.rank_bytes(run_config(parallel={"data": 4}), EXPERTS)
    apart = accelerators.rank_bytes(run_config(parallel={"data": 4, "expert": 4}), EXPERTS)
    experts = 2 * 3 * 28 * 8 * 1024 * 768
    assert alike.weights - apart.weights == experts * 3 // 4
    assert apart.optimizer == pytest.approx(alike.optimizer)


@pytest.mark.parametrize("gpu", [H100, None], ids=["gpu", "cores"])
def test_every_expert_that_a_token_goes_to_keeps_a_copy_of_its_input(gpu: gpus.Gpu | None) -> None:
    def numbers(chosen: int) -> int:
        model = model_from_config(EXPERTS.config | {"num_experts_per_tok": chosen})
        cfg = run_config(model={"dtype": "bfloat16"})
        numbers = capacity.processes(cfg, model, gpu)[0].parts["activations"] // 2
        return numbers // accelerators.micro_batch_tokens(cfg) // model.num_layers

    local = capacity.LOCAL_HIDDEN, capacity.LOCAL_HEADS, capacity.LOCAL_WIDTH
    hidden, heads, width = (4, 2, 3) if gpu else local
    attention = (heads + 1) * (16 + 8) * 128  # Qwen3's, with norms of queries and keys
    assert numbers(2) == attention + (hidden + 1) * 1024 + 2 * width * 768
    assert numbers(8) == attention + (hidden + 7) * 1024 + 8 * width * 768


@pytest.mark.parametrize(
    ("sections", "part"),
    [
        ({"parallel": {"recompute": "full"}}, "activations"),
        ({"train": {"micro_batch_tokens": 4096}}, "activations"),
        ({"parallel": {"data": 2}}, "optimizer"),
        ({"optim": {"offload": True}}, "optimizer"),
        ({"model": {"reference": "offload"}}, "reference"),
    ],
    ids=lambda value: str(value),
)
def test_a_key_that_saves_memory_takes_from_its_part_alone(sections: dict[str, Any], part: str) -> None:
    before = capacity.processes(run_config(), QWEN, H100)[0].parts
    after = capacity.processes(run_config(**sections), QWEN, H100)[0].parts
    assert after.get(part, 0) < before[part]
    follows = {part, "reserve"} if part == "activations" else {part}
    assert {name for name in before if after.get(name, 0) != before[name]} == follows


@pytest.mark.parametrize("gpu", [H100, None], ids=["gpu", "cores"])
def test_a_pack_that_the_mini_batch_can_not_fill_is_planned_with_what_there_is(gpu: gpus.Gpu | None) -> None:
    def activations(tokens: int, **parallel: int) -> int:
        train = {"batch_size": 32, "mini_batch_size": 8, "micro_batch_tokens": tokens}
        cfg = run_config(parallel=parallel, train=train, model={"dtype": "bfloat16"})
        return capacity.processes(cfg, QWEN, gpu)[0].parts["activations"]

    sequence = run_config().max_tokens
    assert activations(8 * sequence) == activations(1 << 20) == 8 * activations(sequence)
    assert activations(1 << 20, data=4) == activations(2 * sequence, data=4) == 2 * activations(sequence, data=4)
    if gpu is not None:  # whose plan has stages
        assert activations(sequence, pipeline=4) == activations(sequence)
        assert activations(1 << 20, pipeline=4) == activations(4 * sequence, pipeline=4) == 2 * activations(sequence)


def test_an_engines_cache_is_what_its_share_leaves() -> None:
    cfg = run_config(rollout={"gpu_memory_utilization": 0.5})
    engine = capacity.processes(cfg, QWEN, H100)[-1]
    room = capacity.cache(cfg, QWEN, H100)
    assert engine.total_bytes == engine.limit_bytes == H100.memory_bytes // 2
    assert room.token_bytes == 2 * 28 * 2 * 128 * 2 and room.num_tokens == room.num_bytes // room.token_bytes
    none = run_config(rollout={"gpu_memory_utilization": 0.05})
    assert capacity.cache(none, QWEN, H100).num_tokens == 0
    assert not capacity.processes(none, QWEN, H100)[-1].fits


# --- seconds


def test_the_parts_of_a_step_add_up_unless_engines_draw_ahead() -> None:
    turns = step(run_config(), shared=True)
    parts = turns.parts()
    assert parts.pop("total") == turns.total == pytest.approx(sum(parts.values()))
    ahead = step(run_config(objective={"name": "oapl"}, rollout={"max_staleness": 2}))
    assert ahead.generate > ahead.reference + ahead.policy
    assert ahead.total == pytest.approx(ahead.generate + ahead.publish)


def test_seconds_follow_the_gpu_and_the_ranks() -> None:
    cfg = run_config()
    fast = dataclasses.replace(H100, peak_flops=2 * H100.peak_flops)
    assert pace.step_seconds(cfg, QWEN, fast, shared=False, num_nodes=1).reference == step(cfg).reference / 2
    replicas = step(run_config(parallel={"data": 2}))
    assert replicas.reference == pytest.approx(step(cfg).reference / 2)
    tensor = step(run_config(parallel={"tensor": 2}))
    assert step(cfg).reference / 2 < tensor.reference < step(cfg).reference  # they send to each other
    assert step(run_config(rollout={"num_engines": 2})).generate < step(cfg).generate


def test_workers_of_an_engine_wait_for_their_link_and_a_lone_worker_for_none() -> None:
    slow = dataclasses.replace(H100, link_rate=H100.link_rate / 10)

    def seconds(gpu: gpus.Gpu, workers: int) -> float:
        cfg = run_config(rollout={"tensor": workers})
        return pace.generation_seconds(cfg, QWEN, gpu, num_responses=64, num_prompts=64)

    assert seconds(slow, 2) > seconds(H100, 2) and seconds(slow, 1) == seconds(H100, 1)


def test_the_last_wave_of_an_engine_takes_as_long_as_the_sequences_in_it() -> None:
    cfg = run_config(rollout={"max_num_seqs": 64})

    def seconds(responses: int) -> float:
        return pace.generation_seconds(cfg, QWEN, H100, responses, num_prompts=8)

    whole, more = seconds(128), [seconds(128 + rest) for rest in (1, 32, 63, 64)]
    assert whole < more[0] < 1.3 * whole and more == sorted(more)
    assert more[-1] - whole == pytest.approx(whole - seconds(64))


def test_a_pipelines_bubble_shrinks_with_micro_batches_and_virtual_stages() -> None:
    def seconds(**parallel: int) -> float:
        return step(run_config(parallel={"pipeline": 4, **parallel}, train={"micro_batch_tokens": 16384})).policy

    small = run_config(parallel={"pipeline": 4}, train={"micro_batch_tokens": 2048})
    assert seconds(virtual=7) < seconds() and step(small).policy < seconds()


def test_recompute_costs_a_forward_pass_of_the_layers() -> None:
    plain, again = step(run_config()), step(run_config(parallel={"recompute": "full"}))
    assert again.reference == plain.reference
    assert plain.policy < again.policy < plain.policy + plain.reference


def test_replicas_on_several_nodes_wait_for_the_network() -> None:
    cfg = run_config(parallel={"data": 64}, train={"batch_size": 64})
    assert step(cfg, num_nodes=8).policy > step(cfg).policy


# --- what fits


def test_a_shared_gpus_refusal_is_that_of_the_run() -> None:
    cfg = run_config(cluster={"share_gpus": True}, train={"micro_batch_tokens": 65536})
    (problem,) = forecast(cfg, QWEN, H100, None).problems
    with pytest.raises(ValueError) as refusal:
        accelerators.shares_of(cfg, QWEN, H100.memory_bytes)
    assert problem == str(refusal.value)


def test_on_shared_gpus_an_engine_that_does_not_fit_hides_no_rank_that_does_not() -> None:
    cfg = run_config(
        cluster={"share_gpus": True},
        rollout={"gpu_memory_utilization": 0.02},
        train={"batch_size": 512, "micro_batch_tokens": 65536},
    )
    worker, engine, rank = forecast(cfg, QWEN, H100, None).problems
    assert worker.startswith("worker of an engine: ") and engine.startswith("rollout.gpu_memory_utilization: 0.02")
    assert rank.startswith("memory of a shared GPU: a policy rank needs about 1") and "lower train.micro_batch" in rank
    with pytest.raises(ValueError) as refusal:
        accelerators.shares_of(cfg, QWEN, H100.memory_bytes)
    assert str(refusal.value) == f"{engine}; and {rank}"


def test_too_few_gpus_and_a_rank_that_is_too_large_are_both_named() -> None:
    packs = {"batch_size": 1024, "micro_batch_tokens": 65536}
    cfg = run_config(parallel={"data": 16}, train=packs, slurm={"gpus_per_node": 4})
    rank, gpus_there = forecast(cfg, QWEN, H100, None).problems
    assert rank.startswith("policy rank 0 to 15: ") and "one H100 has 79.6 GiB" in rank
    assert gpus_there.startswith("GPUs: data=16 makes 16 ranks")


def test_a_layout_that_does_not_divide_the_model_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"tensor=5.*part that fits: one rank"):
        forecast(run_config(parallel={"tensor": 5}), QWEN, H100, None)


@pytest.mark.parametrize("gpu", [H100, None], ids=["gpu", "cores"])
def test_more_tokens_than_the_model_has_positions_are_refused_as_by_the_run(gpu: gpus.Gpu | None) -> None:
    longest = SHAPES["1.5b"]["max_position_embeddings"] - 256
    data, model = {"max_prompt_tokens": 256}, {"dtype": "bfloat16"}
    cfg = run_config(data=data, model=model, sampling={"max_response_tokens": longest + 1})
    with pytest.raises(ValueError, match="max_response_tokens: 32769 exceeds the 32768 positions"):
        forecast(cfg, QWEN, gpu, None)
    forecast(run_config(data=data, model=model, sampling={"max_response_tokens": longest}), QWEN, gpu, None)


def test_stage_1_costs_by_the_prompts_that_there_are(tmp_path: Path) -> None:
    rows = [{"question": f"{i}?", "answer": "1"} for i in range(6)]
    cfg = run_config(data={"path": str(samples.write_jsonl(tmp_path / "p.jsonl", rows))})
    assert count_prompts(cfg) == 6
    hours = [forecast(cfg, QWEN, H100, number).stage_1_hours for number in (None, 6_000, 12_000)]
    assert hours[0] is None and hours[1] and hours[2] == pytest.approx(2 * hours[1], rel=0.05)
    grpo = run_config(objective={"name": "grpo"})
    assert forecast(grpo, QWEN, H100, 6).stage_1_hours is None
    filtered = run_config(objective={"name": "grpo"}, filter={"all_right": 0.0})
    assert forecast(filtered, QWEN, H100, 6_000).stage_1_hours == hours[1]
    (tmp_path / "p.jsonl").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="1 of 1 rows can't be used"):
        count_prompts(cfg)


def test_gpu_hours_are_of_all_gpus_that_the_nodes_hold_and_the_clocks_of_none() -> None:
    def hours(**slurm: Any) -> tuple[Any, ...]:
        ahead = forecast(run_config(rollout={"num_engines": 6, "tensor": 2}, slurm=slurm), QWEN, H100, 7_000)
        assert ahead.num_gpus == 13 and ahead.stage_1_hours and ahead.stage_1_clock_hours
        clocks = ahead.training_clock_hours, ahead.stage_1_clock_hours
        return ahead.training_hours / clocks[0], ahead.stage_1_hours / clocks[1], *clocks

    *num_gpus, training, stage_1 = hours(nodes=4, gpus_per_node=4)
    assert num_gpus == pytest.approx([16, 12])
    assert hours(nodes=4, gpus_per_node=4, env=["ASTAR_SPARE_NODES=1"]) == pytest.approx((20, 16, training, stage_1))
    assert hours(nodes=2, gpus_per_node=0) == pytest.approx((13, 12, training, stage_1))  # no nodes are asked for


def test_host_memory_has_what_keys_move_there() -> None:
    def host(**sections: Any) -> int:
        return forecast(run_config(**sections), QWEN, H100, None).host_bytes

    assert host(optim={"offload": True}) - host() == 12 * QWEN.num_parameters()
    turns = {"cluster": {"share_gpus": True}}
    assert host(train={"offload": "all"}, **turns) - host(**turns) == 14 * QWEN.num_parameters()
    assert host(train={"offload": "all"}) == host()


def test_a_small_model_several_gpus_and_an_unmeasured_kind_are_cautioned() -> None:
    assert forecast(run_config(), QWEN, H200, None).cautions == ()
    small = model_from_config(SHAPES["smollm2"])
    cfg = run_config(parallel={"data": 2}, model={"dtype": "float32"})
    words = " ".join(forecast(cfg, small, gpus.named("a100"), None).cautions)
    assert all(word in words for word in ("launches", "data sheet", "no run on A100", "float32", "flash-attn"))
    assert not any("flash-attn" in caution for caution in forecast(cfg, small, H100, None).cautions)


def test_experts_an_optimiser_on_the_host_and_layers_on_another_kind_of_gpu_are_cautioned() -> None:
    for cfg, model, gpu, words in (
        (run_config(), EXPERTS, H200, "no model with experts has been measured"),
        (run_config(optim={"offload": True}), QWEN, H200, "Adam computes on the host"),
        (run_config(), QWEN, H100, "no run on H100 has been measured: the share of its peak that layers reach"),
    ):
        cautions = forecast(cfg, model, gpu, None).cautions
        assert sum(words in caution for caution in cautions) == 1, cautions
        assert len(cautions) == 1 or model is EXPERTS


# --- the command


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["1.5b"]), encoding="utf-8")
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(samples.run_tree(model={"path": str(tmp_path)})), encoding="utf-8")
    return file


def test_it_needs_no_lane_and_its_json_adds_up(run_file: Path) -> None:
    done = python(WITHOUT_A_LANE, "plan", "--config", str(run_file), "--gpu", "h200", "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["fits"] and figures["num_gpus"] == 2 and figures["nearest"] == []
    rank = next(process for process in figures["processes"] if process["name"] == "policy rank 0")
    assert sum(rank["parts"].values()) > 60 * GIB
    seconds = figures["seconds"]
    assert seconds.pop("total") == pytest.approx(sum(seconds.values()))
    assert figures["training_hours"] == pytest.approx(8 * figures["training_clock_hours"])
    assert figures["training_clock_hours"] == pytest.approx(100 * sum(seconds.values()) / 3600)


def test_it_says_who_takes_how_much_and_what_fits_instead(run_file: Path, astar: Any) -> None:
    status, words, _ = astar("plan", "--config", run_file, "--gpu", "A10", "--set", "cluster.share_gpus=true")
    assert status == 1
    assert re.search(r"policy rank 0: 6\d\.\d of 22\.5: weights 2\.9, gradients 5\.8, ", words)
    assert "does not fit: memory of a shared GPU: a policy rank needs" in words and "fits: --set " in words
    assert "looking for what fits: " in words  # which may take half a minute
    status, words, _ = astar("plan", "--config", run_file, "--gpu", "A100")
    assert status == 0 and re.search(r"; 100 steps: about \d+\.\d GPU hours, \d+\.\d by the clock; stage 1 not ", words)
    assert "no run on A100 has been measured" in words and "at most" not in words
    status, words, _ = astar("plan", "--config", run_file)
    assert status == 0 and "driver and Ray" in words and "name one with --gpu" in words


def test_where_nothing_near_fits_it_says_what_was_tried(run_file: Path, astar: Any) -> None:
    (run_file.parent / "config.json").write_text(json.dumps(SHAPES["7b"] | {"num_hidden_layers": 512}), "utf-8")
    status, words, _ = astar("plan", "--config", run_file, "--gpu", "A10", "--set", "slurm.gpus_per_node=2")
    assert status == 1 and "nothing near fits: up to 3 changes at once were tried, of train.micro_batch" in words
    assert all(key in words for key in ("parallel.pipeline", "rollout.num_engines", "slurm.nodes", "GPUs with"))


def test_an_unknown_gpu_is_refused_with_the_names(run_file: Path) -> None:
    done = python(WITHOUT_A_LANE, "plan", "--config", str(run_file), "--gpu", "H1000")
    assert done.returncode == 2
    assert done.stderr.startswith("astar: --gpu H1000: expected one of GB200, ") and "Traceback" not in done.stderr
