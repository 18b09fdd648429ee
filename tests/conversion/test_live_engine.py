"""Weights published into a real vLLM engine: afterwards it is a fresh engine on the same weights.

Both hold what the tiles say, bit for bit, draw the same, and agree with transformers on prompts.
"""

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
from exports import write_export
from live_faults import LiveFault, live_faults
from tiny_models import World, config, empty_world, random_weights, reference_world, write_folder
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from transformers import AutoModelForCausalLM

from conversion.families import Model, model_from_config
from conversion.plan import plan
from conversion.tiles import ParallelLayout
from conversion.transfer.route import Place, Route, Way, here
from conversion.verify import Holdings, Verifier, mismatch, sent_parts

BUCKET_BYTES = 50_000  # several buckets, and an embedding larger than one
PROGRAM = Path(__file__).with_name("live_engine.py")
TIED_LLAMA = config(hidden_size=128, num_attention_heads=4, tie_word_embeddings=True)
UNTIED_QWEN2 = config("qwen2", hidden_size=192, num_attention_heads=6)  # vocabulary 131: odd, padded to 192
# Heads of a size of their own, and experts of which vLLM pads and packs 40 rows; its kernel wants 32 to divide 96.
EXPERTS = config("qwen3_moe", hidden_size=96, head_dim=32)
UNNORMED = {"norm_topk_prob": False, "num_experts_per_tok": 3, "tie_word_embeddings": True}
ONE_KEY_HEAD = config("qwen2", hidden_size=128, num_key_value_heads=1)  # replicated over an engine's workers


def prepared(model: Model, layout: ParallelLayout, route: Route, folder: Path) -> tuple[World, dict[str, Any]]:
    """New weights as ranks of `layout` hold them, and the request to publish them; the folders are written."""
    weights = random_weights(model, seed=2)
    old = write_folder(folder / "old", model, random_weights(model, seed=1))
    write_export(folder / "export", weights, old)
    shapes = {rank: model.megatron_shapes(layout, rank) for rank in range(layout.world_size)}
    world = reference_world(model.megatron_tiles(layout), weights, empty_world(shapes))
    generator = torch.Generator().manual_seed(3)
    init_info = {
        "config": model.config,
        "layout": dataclasses.asdict(layout),
        "dtype": "float32",
        "route": dataclasses.asdict(route),
    }
    return world, {
        "folder": str(old),
        "export": str(folder / "export"),
        "prompts": [torch.randint(0, model.vocab_size, (n,), generator=generator).tolist() for n in (3, 20, 45)],
        "init_info": init_info,
    }


def published(cases: list[tuple[dict[str, object], ParallelLayout, Way]], tensor: int, folder: Path) -> list[Any]:
    """Sends new weights from here to engines of another process, one a case; what those then say, already audited."""
    requests, senders, proofs = [], [], []
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for number, (small, layout, by) in enumerate(cases):
        model, place = model_from_config(small), folder / str(number)
        route = Route(
            way=by,
            num_sources=layout.world_size,
            num_engines=1,
            num_workers=tensor,
            folder=str(place),
            host="127.0.0.1",
            port=store.port,
            name=f"case {number}",
            bucket_bytes=BUCKET_BYTES,
            timeout_seconds=500.0,
        )
        world, request = prepared(model, layout, route, place)
        requests.append(request)
        way = plan(model.megatron_tiles(layout), model.vllm_tiles(tensor))
        senders += [route.sender(way, rank, tensors, torch.float32) for rank, tensors in world.items()]
        sent = [Holdings(sent_parts(way, rank), tensors, torch.float32) for rank, tensors in world.items()]
        proofs.append((way, sent))
    (folder / "requests.json").write_text(json.dumps(requests))
    command = [sys.executable, str(PROGRAM), str(tensor), str(folder / "requests.json"), str(folder / "answers.json")]
    environment = os.environ | {"PYTHONPATH": str(PROGRAM.parents[2])}
    with ThreadPoolExecutor(len(senders)) as threads:  # the senders wait for the engines
        sending = [threads.submit(sender.send, 7) for sender in senders]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550)
        wait(sending)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    for sender in senders:
        sender.close()
    answers = json.loads((folder / "answers.json").read_text())
    for answer, request in zip(answers, requests, strict=True):
        assert answer["live differences"] == answer["fresh differences"] == [[]] * tensor
        assert answer["versions"] == [7] * tensor
        wanted = token_logprobs(request["export"], request["prompts"])
        assert_live_equals_fresh(answer, wanted)
        assert all(size > 0 for size in answer["dropped"]) and answer["again"] == answer["after"]
    for answer, (way, sent), (small, _, _) in zip(answers, proofs, cases, strict=True):
        assert_faults_are_named(answer, Verifier(way), sent, live_faults(small, tensor))
        assert [Place(memory=memory, device=device) for memory, device in answer["places"]] == [
            here(torch.device("cpu"))
        ] * tensor
    return answers


def assert_faults_are_named(
    answer: dict[str, Any], verifier: Verifier, sent: list[Holdings], faults: dict[str, LiveFault]
) -> None:
    """Each worker's own audit: clean as it is, and with a fault injected that fault by name and nothing else."""
    expected = verifier.manifest(7, dict(enumerate(end.digests() for end in sent)))
    for rank, clean in enumerate(answer["audits"]["none"]):
        parts = verifier.target_parts[rank]
        assert verifier.first_mismatch(expected, rank, clean["digests"]) is None and clean["faults"] == []
        assert len(answer["rows"][rank]) == parts[0].rectangle[1] - parts[0].rectangle[0]
        for name, fault in faults.items():
            audit = answer["audits"][name][rank]
            if fault.worker not in (None, rank):
                assert audit == clean
            elif fault.words:
                assert audit["digests"] == clean["digests"]
                ((tensor, row, detail),) = audit["faults"]
                assert (tensor, row) == (fault.named, fault.row) and fault.words in detail
            else:
                assert audit["faults"] == []
                index = verifier.first_mismatch(expected, rank, audit["digests"])
                assert index is not None and parts[index].hf == fault.named, name
                source, origin = verifier.origin(rank, index)
                rows = dict(answer["rows_of"][name][rank])[index]
                error = mismatch(7, parts[index], f"worker {rank}", sent[source].rows(origin), rows)
                assert (error.tensor, error.row) == (fault.named, parts[index].rectangle[0] + fault.row)
                assert f"worker {rank} does not hold {fault.named} as it was sent, first bad row" in str(error)


def token_logprobs(folder: str, prompts: list[list[int]]) -> list[list[float]]:
    """Of each prompt's tokens but the first, by transformers in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = []
    for ids in prompts:
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        rows.append(logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist())
    return rows


def assert_live_equals_fresh(answer: dict[str, Any], wanted: list[list[float]]) -> None:
    generated = zip(answer["before"], answer["after"], answer["fresh"], wanted, strict=True)
    for before, after, fresh, of_transformers in generated:
        assert after["tokens"] == fresh["tokens"]
        assert after["logprobs"] == pytest.approx(fresh["logprobs"], abs=1e-5)
        assert after["logprobs"] != pytest.approx(before["logprobs"], abs=1e-2)
        assert fresh["logprobs"][: len(of_transformers)] == pytest.approx(of_transformers, abs=1e-4)


def test_a_live_engine_says_what_a_fresh_one_on_the_export_says(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    (answer,) = published([(EXPERTS, ParallelLayout(pipeline=2, data=2, expert=2), "shared memory")], 1, tmp_path)
    (refusal,) = answer["laid_out_anew"]
    assert refusal.startswith("model.layers.0.mlp.experts.routed_experts: vLLM's kernel for its experts is FLASHINFER")


@pytest.mark.slow
def test_engines_of_dense_models_do_too(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    cases: list[tuple[dict[str, object], ParallelLayout, Way]] = [
        (TIED_LLAMA, ParallelLayout(pipeline=2, data=2), "shared memory"),
        (UNTIED_QWEN2, ParallelLayout(tensor=2), "gloo"),
    ]
    for answer in published(cases, 1, tmp_path):
        assert "model.layers.0.mlp.gate_up_proj.weight has shape (112," in answer["refusal"]


@pytest.mark.slow
def test_engines_of_the_other_families_do_too(tmp_path: Path) -> None:
    """Rotary positions that Llama 3 scales, heads of a size of their own, norms of heads, experts weighed unnormed."""
    pytest.importorskip("vllm")
    sizes: dict[str, Any] = {"hidden_size": 96, "head_dim": 32}
    cases: list[tuple[dict[str, object], ParallelLayout, Way]] = [
        (config("llama3", **sizes, tie_word_embeddings=True), ParallelLayout(tensor=2, pipeline=2), "shared memory"),
        (config("mistral", **sizes), ParallelLayout(pipeline=2), "gloo"),
        (config("qwen3", **sizes, tie_word_embeddings=True), ParallelLayout(tensor=2), "shared memory"),
        (EXPERTS | UNNORMED, ParallelLayout(data=2, expert=2), "gloo"),
    ]
    published(cases, 1, tmp_path)


@pytest.mark.slow
def test_engines_of_two_workers_do_too(tmp_path: Path) -> None:
    """Key heads that both workers hold, heads and experts that are cut (and padded for vLLM's kernel), a tied head."""
    pytest.importorskip("vllm")
    cases: list[tuple[dict[str, object], ParallelLayout, Way]] = [
        (ONE_KEY_HEAD, ParallelLayout(pipeline=2), "gloo"),
        (EXPERTS | {"num_key_value_heads": 1}, ParallelLayout(data=2, expert=2), "shared memory"),
        (TIED_LLAMA, ParallelLayout(tensor=2, pipeline=2), "shared memory"),
    ]
    published(cases, 2, tmp_path)
