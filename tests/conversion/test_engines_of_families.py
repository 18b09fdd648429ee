"""A real vLLM engine of each family holds what its tiles say, bit for bit, and agrees with transformers on prompts."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import config, random_weights, write_folder
from transformers import AutoModelForCausalLM

from conversion.families import model_from_config

PROGRAM = Path(__file__).with_name("engine_holds.py")
# vLLM's CPU kernels take heads of 32 and more, and experts of hidden sizes that 32 divides.
SIZES: dict[str, Any] = {"hidden_size": 96, "num_attention_heads": 4, "head_dim": 32}
CASES: dict[str, dict[str, Any]] = {
    "llama3": {"tie_word_embeddings": True},
    "mistral": {},
    "qwen3": {"tie_word_embeddings": True},
}
UNNORMED = {"norm_topk_prob": False, "num_experts_per_tok": 3, "tie_word_embeddings": True}


def written(folder: Path, family: str, **changes: Any) -> Path:
    model = model_from_config(config(family, **(SIZES | changes)))
    return write_folder(folder, model, random_weights(model, seed=4))


def token_logprobs(folder: Path, prompts: list[list[int]]) -> list[list[float]]:
    """Of each prompt's tokens but the first, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = []
    for ids in prompts:
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        rows.append(logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist())
    return rows


def assert_engines_hold(folders: list[Path], tensor: int, place: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, 131, (n,), generator=generator).tolist() for n in (3, 20, 45)]
    (place / "requests.json").write_text(json.dumps([{"folder": str(f), "prompts": prompts} for f in folders]))
    command = [sys.executable, str(PROGRAM), str(tensor), str(place / "requests.json"), str(place / "answers.json")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(PROGRAM.parents[2]), str(PROGRAM.parent)])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    for folder, answer in zip(folders, json.loads((place / "answers.json").read_text()), strict=True):
        assert answer["differences"] == [[]] * tensor, folder
        for wanted, generated in zip(token_logprobs(folder, prompts), answer["generated"], strict=True):
            assert generated["logprobs"][: len(wanted)] == pytest.approx(wanted, abs=1e-4), folder


@pytest.mark.slow
def test_an_engine_with_experts_holds_its_tiles_and_agrees_with_transformers(tmp_path: Path) -> None:
    """Head norms, heads of a size of their own and fused experts at once: the one to run where time is short."""
    pytest.importorskip("vllm")
    assert_engines_hold([written(tmp_path / "model", "qwen3_moe")], 1, tmp_path)


@pytest.mark.slow
def test_engines_of_every_family_do_too(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    folders = [written(tmp_path / family, family, **changes) for family, changes in CASES.items()]
    assert_engines_hold([*folders, written(tmp_path / "unnormed", "qwen3_moe", **UNNORMED)], 1, tmp_path)


@pytest.mark.slow
def test_an_engine_of_two_workers_does_too(tmp_path: Path) -> None:
    """One key-value head on two workers, and experts whose shard of 20 rows vLLM pads for its kernel."""
    pytest.importorskip("vllm")
    assert_engines_hold([written(tmp_path / "model", "qwen3_moe", num_key_value_heads=1)], 2, tmp_path)
