"""Sweep, train, export and generate again with the real Ray, vLLM and Megatron-Core, on a tiny model."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import samples
import torch
import yaml
from drawing import drawn
from length_reward import reward as length_reward
from transformers import AutoModelForCausalLM

from astar_megatron import config
from astar_megatron.data import rollout_files
from astar_megatron.data.v_star import VStarTable
from astar_megatron.evaluate import hugging_face
from astar_megatron.rollout.training import TrainingRollouts
from astar_megatron.run.evaluation import evaluate
from astar_megatron.run.fleet import Fleet, engines_of
from astar_megatron.run.prepare import Inputs, prepare
from astar_megatron.run.tracking import Tracker, read_metrics
from astar_megatron.run.training import stage_1
from astar_megatron.sweep import sweep
from astar_megatron.train import train
from astar_megatron.types import Prompt
from conversion.ends import open_end
from conversion.rewrite import compare

SECONDS = {
    *("drain", "publish", "generate", "score", "train", "reference", "policy"),
    *("engines_idle", "ranks_idle", "checkpoint", "record", "total"),
}
METHODS: dict[str, dict[str, Any]] = {
    "astar": {},
    "oapl": {"oapl": {"group_size": 3, "refresh_steps": 2}},  # the reference is part of the checkpoint
    "spo": {},  # so are the values, by which prompts are chosen
    "rebel": {},
    "ppo": {},  # so is the critic
}


@pytest.mark.parametrize("kind", ["tied_llama", pytest.param("untied_qwen2", marks=pytest.mark.slow)])
def test_sweep_train_export_and_the_engine_holds_what_was_exported(
    kind: str, run_tree: Any, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setenv("CXX", "/no/compiler")  # nothing is compiled: torch would take seconds, and need one
    tree = run_tree(request.getfixturevalue(kind)) | {"cluster": {"share_gpus": kind == "untied_qwen2"}}
    cfg = config.validate(tree)
    inputs, tracker = prepare(cfg), Tracker(cfg.run_dir)
    short, long = (Prompt(uid="p", token_ids=tuple(range(3, end)), text="", answer="") for end in (33, 83))
    with Fleet(cfg, inputs.model, tracker) as fleet:
        engines, policy = fleet.engines, fleet.policy
        (first,) = drawn(engines, short, cfg.sampling, greedy=True)
        (first_long,) = drawn(engines, long, cfg.sampling)  # fills two blocks of the prefix cache
        table = sweep(cfg, inputs, engines, tracker)
        assert table.summary().samples == 24
        assert table.missing(inputs.prompts, 2) == []

        train(cfg, inputs, stage_1(cfg, inputs), fleet, tracker)
        ((evaluated, responses),) = evaluate(cfg, inputs, engines, tracker, "eval")
        (last,) = drawn(engines, short, cfg.sampling, greedy=True)
        (last_long,) = drawn(engines, long, cfg.sampling)
        sequences = [short.token_ids + first.token_ids, short.token_ids + last.token_ids]
        megatron_first, megatron = policy.logprobs(sequences, [len(short.token_ids)] * 2)
        (megatron_long,) = policy.logprobs([long.token_ids + last_long.token_ids], [len(long.token_ids)])
    with engines_of(cfg, tracker, str(cfg.export_dir)) as fresh_engines:
        (fresh,) = drawn(fresh_engines, short, cfg.sampling, greedy=True)

    moved = max(abs(a - b) for a, b in zip(first.token_logprobs, megatron_first, strict=True))
    assert moved > 1e-2  # what the updates changed
    assert (first_long.first_version, first_long.last_version) == (0, 0)
    assert (last_long.first_version, last_long.last_version) == (3, 3)
    assert last_long.token_logprobs == pytest.approx(megatron_long, abs=1e-3)  # blocks of old weights would show here
    assert last.token_ids == fresh.token_ids
    assert last.token_logprobs == pytest.approx(fresh.token_logprobs, abs=1e-5)
    assert last.token_logprobs == pytest.approx(megatron, abs=1e-3)

    assert json.loads((cfg.export_dir / "conversion.json").read_text())["logprobs"]["max_difference"] < 1e-4
    model = AutoModelForCausalLM.from_pretrained(cfg.export_dir, dtype=torch.float32)
    with torch.no_grad():
        rows = model(torch.tensor([sequences[1]])).logits[0].log_softmax(-1)
    plain = [float(rows[t - 1, sequences[1][t]]) for t in range(len(short.token_ids), len(sequences[1]))]
    assert megatron == pytest.approx(plain, abs=1e-4)

    rows = [json.loads(line) for line in responses]
    uids = [prompt.uid for prompt in inputs.prompts[:5]]
    assert [(row["uid"], row["sample"]) for row in rows[:5]] == [(uid, "greedy") for uid in uids]
    assert [(row["uid"], row["sample"]) for row in rows[5:]] == [(uid, sample) for uid in uids for sample in (0, 1)]
    assert evaluated.greedy.mean == pytest.approx(sum(row["reward"] for row in rows[:5]) / 5)
    assert evaluated.sampled["avg@2"].mean == pytest.approx(sum(row["reward"] for row in rows[5:]) / 10)
    assert all(row["reward"] == length_reward(row["response"], "") for row in rows)
    last = (tracker.run_dir / "eval_step_00000003.jsonl").read_text()  # of the same weights, after the last publish
    assert last == "".join(responses)
    with hugging_face(open_end(tracker.run_dir / "checkpoints" / "step_00000003"), tracker) as folder:
        compare(open_end(folder), open_end(cfg.export_dir))

    placement = json.loads((tracker.run_dir / "placement.json").read_text())
    here = {"node": "127.0.0.1", "gpus": []}
    assert placement == {"nodes": [{"address": "127.0.0.1", "num_gpus": 0}], "ranks": [here], "engines": [here]}

    steps = read_metrics(cfg.run_dir)
    assert [step["step"] for step in steps] == [step["version"] for step in steps] == [0, 1, 2]
    for step in steps:
        evaluates = step["step"] != 1  # eval.interval is 2
        assert ("eval" in step) == evaluates
        more = {"eval": evaluates, "turns": cfg.cluster.share_gpus}
        assert set(step["seconds"]) == SECONDS | {name for name, is_there in more.items() if is_there}
        assert abs(step["engine_gap"]) < 1e-3
        assert step["mfu"] is None  # the peak of a CPU is not known
        assert all(math.isfinite(value) for value in step.values() if isinstance(value, int | float))
        assert step["skipped_steps"] == 0 and all(size > 0 for size in step["peak_memory_bytes"])
    assert steps[0]["eval"]["prompts"]["greedy"] >= 0
    assert samples.unlike_the_umask(tracker.run_dir) == []
    assert not list(Path("/dev/shm").glob(f"astar-{os.getpid()}-*"))


@pytest.mark.slow
@pytest.mark.parametrize("offload", ["cache", "all"])
def test_policy_and_engines_that_share_memory_compute_what_they_do_apart(
    offload: str, run_tree: Any, tied_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    tree = run_tree(tied_llama)

    def metrics(run: str, **changes: Any) -> list[dict[str, Any]]:
        cfg = config.validate(tree | {"run_dir": str(tmp_path / run)} | changes)
        inputs, tracker = prepare(cfg), Tracker(cfg.run_dir)
        with Fleet(cfg, inputs.model, tracker) as fleet:
            sweep(cfg, inputs, fleet.engines, tracker)
            train(cfg, inputs, stage_1(cfg, inputs), fleet, tracker)
        return read_metrics(cfg.run_dir)

    apart = metrics("apart")
    shared = metrics("shared", cluster={"share_gpus": True}, train=tree["train"] | {"offload": offload})
    assert [line | samples.MEASURED for line in shared] == [line | samples.MEASURED for line in apart]
    assert all(line["seconds"]["turns"] > 0 and line["kept_bytes"] == [0] for line in shared)
    (returned,) = {tuple(line["returned_bytes"]) for line in shared}
    assert len(returned) == 1 and returned[0] > 0
    assert not any("turns" in line["seconds"] or "kept_bytes" in line for line in apart)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # five programs
@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_continues_and_ends_with_the_same_numbers(
    method: str, run_tree: Any, tied_llama: Path, tmp_path: Path
) -> None:
    """SIGKILL after step 3 of 4, the same command again: losses and rewards are those of an uninterrupted run."""
    tree = run_tree(tied_llama) | {"checkpoint": {"interval": 1}, "objective": {"name": method}} | METHODS[method]
    tree["train"] |= {"num_steps": 4, "batch_size": 12, "mini_batch_size": 6}

    def command(name: str, run: str, steps: int) -> list[dict[str, Any]]:
        file = tmp_path / f"{run}.yaml"
        file.write_text(yaml.safe_dump(tree | {"run_dir": str(tmp_path / run)}))
        arguments = [sys.executable, "-m", "astar_megatron.cli", name, "--config", str(file)]
        with subprocess.Popen(arguments, cwd=Path(__file__).parent, start_new_session=True) as process:
            while process.poll() is None:
                if name == "train" and len(read_metrics(tmp_path / run)) == steps < 4:
                    process.kill()
                    break
                try:
                    process.wait(timeout=0.2)
                except subprocess.TimeoutExpired:
                    continue
        return read_metrics(tmp_path / run)

    for run in ("whole", "killed"):
        command("sweep", run, 0)
        assert (
            VStarTable.open(tmp_path / run / "v_star", prepare(config.validate(tree)).contract).summary().samples == 24
        )
    whole = command("train", "whole", 4)
    command("train", "killed", 3)
    killed = command("train", "killed", 4)
    assert len(whole) == len(killed) == 4
    for line, other in zip(whole, killed, strict=True):
        assert line | samples.MEASURED == other | samples.MEASURED
    exported = json.loads((tmp_path / "killed" / "hf" / "config.json").read_text())
    assert exported["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.slow
@pytest.mark.parametrize("update", ["in_flight", "drain"])
def test_engines_draw_ahead_and_say_which_weights_drew_each_token(
    update: str, run_tree: Any, untied_qwen2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    tree = run_tree(untied_qwen2) | {"objective": {"name": "oapl"}, "oapl": {"group_size": 5}}
    tree["rollout"] |= {"max_staleness": 2, "update": update, "max_num_seqs": 3}
    tree["sampling"], tree["reward"] = {"max_response_tokens": 60}, {"name": "last_number"}
    tree["train"]["num_steps"] = 5
    cfg = config.validate(tree)
    inputs, tracker = prepare(cfg), Tracker(cfg.run_dir)
    taken: list[Any] = []
    with Fleet(cfg, inputs.model, tracker) as fleet:
        take = TrainingRollouts.take

        def remember(self: Any, version: int, span: Any) -> Any:
            rollouts = take(self, version, span)
            sequences = [rollout.prompt.token_ids + rollout.token_ids for rollout in rollouts]
            scored = fleet.policy.logprobs(sequences, [len(rollout.prompt.token_ids) for rollout in rollouts])
            taken.append((version, rollouts, scored))
            return rollouts

        monkeypatch.setattr(TrainingRollouts, "take", remember)
        train(cfg, inputs, stage_1(cfg, inputs), fleet, tracker)
    steps = read_metrics(cfg.run_dir)
    ages = [step["staleness_max"] for step in steps]
    assert ages[0] == 0 and max(ages) in (1, 2)  # a request that waits for room is drawn by newer weights
    across = same = 0
    for version, rollouts, scored in taken:
        for rollout, logprobs in zip(rollouts, scored, strict=True):
            assert rollout.last_version - rollout.first_version + 1 == len(rollout.tokens_by_version)
            assert sum(rollout.tokens_by_version) == len(rollout.token_ids)
            across += len([count for count in rollout.tokens_by_version if count]) > 1
            older = rollout.older_tokens(version)
            if older < len(logprobs):  # what this version drew, it scores the same, to the token
                same += 1
                assert rollout.token_logprobs[older:] == pytest.approx(logprobs[older:], abs=2e-3)
        assert rollout_files.read(rollout_path(tracker, version), uids(inputs)) == rollouts
    assert same and (across > 0) == (update == "in_flight")


def rollout_path(tracker: Tracker, step: int) -> Path:
    return tracker.run_dir / "rollouts" / f"step_{step:08d}.parquet"


def uids(inputs: Inputs) -> dict[str, Prompt]:
    return {prompt.uid: prompt for prompt in inputs.prompts}
