"""What conversion.json says of an export's log-probs."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from astar_megatron.certificate import certify, fixed_sequences
from conversion import convert
from conversion.ends import open_end


@pytest.fixture
def export(tied_llama: Path, tmp_path: Path) -> Path:
    convert.write_hf(open_end(tied_llama), tmp_path / "export")
    return tmp_path / "export"


def transformers_own(folder: Path, off_by: float):
    """Log-probs by transformers itself, one of them wrong."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def logprobs(sequences: Sequence[Sequence[int]], prompt_tokens: Sequence[int]) -> list[list[float]]:
        assert prompt_tokens == [1] * len(sequences)
        rows = []
        for ids in sequences:
            with torch.no_grad():
                found = model(torch.tensor([list(ids)])).logits[0].log_softmax(-1)
            rows.append([float(found[at, token]) for at, token in enumerate(ids[1:])])
        rows[-1][7] += off_by
        return rows

    return logprobs


def test_the_largest_difference_is_recorded_beside_what_stands_there(export: Path, tied_llama: Path) -> None:
    before = json.loads((export / "conversion.json").read_text())
    for off_by in (0.0, 0.25):
        words = certify(export, transformers_own(tied_llama, off_by))
        record = json.loads((export / "conversion.json").read_text())
        assert record.pop("logprobs")["max_difference"] == pytest.approx(off_by, abs=1e-5)
        assert record == {key: value for key, value in before.items() if key != "logprobs"}
        assert "transformers" in words


def test_large_models_are_not_measured_and_the_record_says_why(export: Path) -> None:
    def never(*_: object) -> list[list[float]]:
        raise AssertionError("the policy was asked")

    size = (export / "model.safetensors").stat().st_size
    words = certify(export, never, max_weight_bytes=size - 1)
    found = json.loads((export / "conversion.json").read_text())["logprobs"]
    assert found == {"max_difference": None, "reason": words}
    assert f"{size:,} bytes" in words


def test_a_conversion_says_that_it_ran_no_model(export: Path) -> None:
    found = json.loads((export / "conversion.json").read_text())["logprobs"]
    assert found["max_difference"] is None
    assert "runs no model" in found["reason"]


def test_fixed_sequences_are_fixed_legal_and_spread() -> None:
    sequences = fixed_sequences(263, 48)
    assert sequences == fixed_sequences(263, 48)
    assert [len(ids) for ids in sequences] == [5, 23, 41, 48]
    tokens = {token for ids in sequences for token in ids}
    assert min(tokens) < 20 and max(tokens) in range(240, 263) and len(tokens) > 60
