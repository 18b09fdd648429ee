"""Weights published into a real vLLM engine: afterwards it says what a fresh engine on the same weights says."""

import dataclasses
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import World, config, empty_world, random_weights, reference_world, write_folder

from conversion import hf
from conversion.families import Model, model_from_config
from conversion.plan import plan
from conversion.tiles import ParallelLayout
from conversion.transfer.shared_memory import SharedMemorySender
from conversion.verify import Holdings, Manifest, Verifier, sent_parts

BUCKET_BYTES = 50_000  # several buckets, and an embedding larger than one
PROGRAM = Path(__file__).with_name("live_engine.py")
TIED_LLAMA = config(hidden_size=128, num_attention_heads=4, tie_word_embeddings=True)
UNTIED_QWEN2 = config("qwen2", hidden_size=192, num_attention_heads=6)  # vocabulary 131: odd, padded to 192
ONE_KEY_HEAD = config("qwen2", hidden_size=128, num_key_value_heads=1)  # replicated over an engine's workers


def prepared(model: Model, layout: ParallelLayout, tensor: int, folder: Path) -> tuple[World, dict[str, Any]]:
    """New weights as ranks of `layout` hold them, and the request to publish them; the folders are written."""
    weights = random_weights(model, seed=2)
    old = write_folder(folder / "old", model, random_weights(model, seed=1))
    hf.save(folder / "export", weights, old)
    shapes = {rank: model.megatron_shapes(layout, rank) for rank in range(layout.world_size)}
    world = reference_world(model.megatron_tiles(layout), weights, empty_world(shapes))
    generator = torch.Generator().manual_seed(3)
    init_info = {
        "config": model.config,
        "layout": dataclasses.asdict(layout),
        "folder": str(folder),
        "dtype": "float32",
        "bucket_bytes": BUCKET_BYTES,
    }
    return world, {
        "folder": str(old),
        "export": str(folder / "export"),
        "prompts": [torch.randint(0, model.vocab_size, (n,), generator=generator).tolist() for n in (3, 9, 20)],
        "init_info": init_info,
    }


def published(cases: list[tuple[dict[str, object], ParallelLayout]], tensor: int, folder: Path) -> list[dict[str, Any]]:
    """Sends new weights from here to engines of another process, one a case; what those then say, already audited."""
    requests, senders, proofs = [], [], []
    for number, (small, layout) in enumerate(cases):
        model, place = model_from_config(small), folder / str(number)
        world, request = prepared(model, layout, tensor, place)
        requests.append(request)
        way = plan(model.megatron_tiles(layout), model.vllm_tiles(tensor))
        senders += [
            SharedMemorySender(way, rank, tensors, place, torch.float32, bucket_bytes=BUCKET_BYTES, timeout_seconds=200)
            for rank, tensors in world.items()
        ]
        sent = [Holdings(sent_parts(way, rank), tensors, torch.float32) for rank, tensors in world.items()]
        proofs.append((way, [[end.full() for end in sent], [end.sampled(7) for end in sent]]))
    (folder / "requests.json").write_text(json.dumps(requests))
    command = [sys.executable, str(PROGRAM), str(tensor), str(folder / "requests.json"), str(folder / "answers.json")]
    environment = os.environ | {"PYTHONPATH": str(PROGRAM.parents[2])}
    with ThreadPoolExecutor(len(senders)) as threads:  # the senders wait for the engines
        sending = [threads.submit(sender.send, 7) for sender in senders]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
        wait(sending)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    for sender in senders:
        sender.close()
    answers = json.loads((folder / "answers.json").read_text())
    for answer, (way, (full, sampled)) in zip(answers, proofs, strict=True):
        verifier = Verifier(way, torch.float32)
        assert_faults_are_named(answer, verifier.manifest(7, True, full), verifier)
        expected = verifier.manifest(7, False, sampled)
        for rank, worker in enumerate(answer["sampled"]):
            assert verifier.first_mismatch(expected, rank, worker["digests"]) is None
    return answers


def assert_faults_are_named(answer: dict[str, Any], expected: Manifest, verifier: Verifier) -> None:
    """Each worker's own audit: clean as it is, and with a fault injected that fault by name and nothing else."""
    for rank, worker in enumerate(answer["audits"]["none"]):
        parts = verifier.held[rank]
        assert verifier.first_mismatch(expected, rank, worker["digests"]) is None and worker["faults"] == []
        assert len(answer["rows"][rank]) == parts[0].rectangle[1] - parts[0].rectangle[0]
        for fault, tensor in (("stale head pack", "lm_head"), ("stale pack", "model.layers.1.mlp.down_proj")):
            audit = answer["audits"][fault][rank]
            assert audit["digests"] == worker["digests"]  # the plain weights are right
            ((name, row, detail),) = audit["faults"]
            assert (name, row) == (f"{tensor}.weight", 0) and "packed copy" in detail
        for fault, tensor in (
            ("flipped bit", "model.layers.0.self_attn.o_proj"),
            ("swapped gate and up", "model.layers.1.mlp.gate_proj"),
        ):
            audit = answer["audits"][fault][rank]
            index = verifier.first_mismatch(expected, rank, audit["digests"])
            assert index is not None and parts[index].hf == f"{tensor}.weight"
            assert audit["faults"] == []


def assert_live_equals_fresh(answer: dict[str, Any]) -> None:
    for before, after, fresh in zip(answer["before"], answer["after"], answer["fresh"], strict=True):
        assert after["tokens"] == fresh["tokens"]
        assert after["logprobs"] == pytest.approx(fresh["logprobs"], abs=1e-5)
        assert after["logprobs"] != pytest.approx(before["logprobs"], abs=1e-2)


def test_a_live_engine_says_what_a_fresh_one_on_the_export_says(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    cases = [(TIED_LLAMA, ParallelLayout(pipeline=2, data=2)), (UNTIED_QWEN2, ParallelLayout(tensor=2))]
    for answer in published(cases, 1, tmp_path):
        assert_live_equals_fresh(answer)
        assert answer["versions"] == [7]
        assert "model.layers.0.mlp.gate_up_proj.weight has shape (112," in answer["refusal"]


@pytest.mark.slow
def test_an_engine_of_two_workers_with_replicated_key_heads_does_too(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    (answer,) = published([(ONE_KEY_HEAD, ParallelLayout(pipeline=2))], 2, tmp_path)
    assert_live_equals_fresh(answer)
    assert answer["versions"] == [7, 7]
