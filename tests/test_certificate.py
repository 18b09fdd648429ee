"""What conversion.json says of an export's log-probs."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from exports import write_export
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from astar_megatron.run.certificate import DisagreementError, certify, certify_conversion, fixed_sequences
from conversion import rewrite
from conversion.ends import open_end


@pytest.fixture
def export(tied_llama: Path, tmp_path: Path) -> Path:
    rewrite.write_hf(open_end(tied_llama), tmp_path / "export")
    return tmp_path / "export"


def recorded(folder: Path) -> dict[str, Any]:
    """What the record of an export says of its log-probs."""
    text = (folder / "conversion.json").read_text()
    return json.loads(text, parse_constant=pytest.fail)["logprobs"]  # NaN is no JSON


def transformers_own(folder: Path, off_by: float):
    """Log-probs by transformers itself, one of them wrong."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def logprobs(sequences: Sequence[Sequence[int]], prompt_tokens: Sequence[int]) -> list[list[float]]:
        assert prompt_tokens == [1] * len(sequences)
        rows = []
        for ids in sequences:
            with torch.no_grad():
                logprobs = model(torch.tensor([list(ids)])).logits[0].log_softmax(-1)
            rows.append([float(logprobs[at, token]) for at, token in enumerate(ids[1:])])
        rows[-1][7] += off_by
        return rows

    return logprobs


def test_the_largest_difference_is_recorded_beside_what_stands_there(export: Path, tied_llama: Path) -> None:
    before = json.loads((export / "conversion.json").read_text())
    for off_by in (0.0, 5e-4):
        words = certify(export, transformers_own(tied_llama, off_by))
        record = json.loads((export / "conversion.json").read_text())
        assert record.pop("logprobs")["max_difference"] == pytest.approx(off_by, abs=1e-5)
        assert record == {key: value for key, value in before.items() if key != "logprobs"}
        assert "transformers" in words


def refusal(folder: Path, logprobs: Any) -> dict[str, Any]:
    """What the record says of an export that is refused, as the message does."""
    with pytest.raises(DisagreementError) as caught:
        certify(folder, logprobs)
    record = recorded(folder)
    assert str(folder) in str(caught.value) and record["reason"] in str(caught.value)
    assert "within" not in str(caught.value)
    assert "holds the weights that it was made from" in str(caught.value)  # a wrong rotary base is no wrong weight
    return record


@pytest.mark.parametrize("off_by", [math.nan, math.inf, -math.inf])
def test_log_probs_that_are_no_numbers_are_refused_on_either_side(
    off_by: float, export: Path, tied_llama: Path, tmp_path: Path
) -> None:
    record = refusal(export, transformers_own(tied_llama, off_by))
    assert record["max_difference"] is None and record["not_finite"] == ["Megatron"]
    weights = load_file(tied_llama / "model.safetensors")
    weights["model.norm.weight"][5] = off_by
    spoiled = tmp_path / "spoiled"
    write_export(spoiled, weights, tied_llama)
    assert refusal(spoiled, transformers_own(tied_llama, 0.0))["not_finite"] == ["transformers"]
    assert refusal(spoiled, transformers_own(spoiled, 0.0))["not_finite"] == ["Megatron", "transformers"]


@pytest.mark.parametrize(("dtype", "right", "wrong"), [(torch.float32, 5e-4, 2e-3), (torch.bfloat16, 0.5, 1.5)])
def test_a_difference_above_the_limit_of_the_type_is_refused(
    dtype: torch.dtype, right: float, wrong: float, tied_llama: Path, tmp_path: Path
) -> None:
    weights = {name: tensor.to(dtype) for name, tensor in load_file(tied_llama / "model.safetensors").items()}
    write_export(tmp_path / "export", weights, tied_llama)
    certify(tmp_path / "export", transformers_own(tmp_path / "export", right))
    record = refusal(tmp_path / "export", transformers_own(tmp_path / "export", wrong))
    assert record["max_difference"] > record["limit"]
    assert (tmp_path / "export" / "model.safetensors").exists()


def test_large_models_are_not_measured_and_the_record_says_why(export: Path) -> None:
    def never(*_: object) -> list[list[float]]:
        raise AssertionError("the policy was asked")

    size = (export / "model.safetensors").stat().st_size
    words = certify(export, never, max_weight_bytes=size - 1)
    assert recorded(export) == {"max_difference": None, "reason": words}
    assert f"{size:,} bytes" in words


def test_a_conversion_by_itself_says_that_nobody_compared(export: Path) -> None:
    assert recorded(export)["max_difference"] is None
    assert "nobody has compared" in recorded(export)["reason"]


def test_fixed_sequences_are_fixed_legal_and_spread() -> None:
    sequences = fixed_sequences(263, 48)
    assert sequences == fixed_sequences(263, 48)
    assert [len(ids) for ids in sequences] == [5, 23, 41, 48]
    assert [len(ids) for ids in fixed_sequences(263, 1)] == [2, 2, 2, 2]  # of one token there is nothing to compare
    tokens = {token for ids in sequences for token in ids}
    assert min(tokens) < 20 and max(tokens) in range(240, 263) and len(tokens) > 60


def test_what_config_json_asks_of_transformers_alone_is_not_asked(export: Path, tied_llama: Path) -> None:
    config = json.loads((export / "config.json").read_text())
    asked = {"attn_implementation": "flash_attention_2", "_attn_implementation": "flash_attention_2"}
    (export / "config.json").write_text(json.dumps(config | asked | {"return_dict": False}))
    assert "within" in certify(export, transformers_own(tied_llama, 0.0))


def test_a_comparison_that_fails_is_recorded_with_its_reason(export: Path) -> None:
    def failing(*_: object) -> list[list[float]]:
        raise RuntimeError("no such kernel")

    with pytest.raises(ValueError, match=rf"{export} is written .* not compared, RuntimeError: no such kernel"):
        certify(export, failing)
    assert "no such kernel" in recorded(export)["reason"]


def test_megatrons_log_probs_are_of_the_copy_of_the_package_that_runs(
    export: Path, tied_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from a clone that is not installed: another copy, which is, would be found by its name."""
    for name, text in {"__init__": "", "model/alone": "def main(): raise SystemExit('this copy ran')"}.items():
        file = tmp_path / "copies/astar_megatron" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path / "copies"))
    with pytest.raises(ValueError, match="this copy ran"):
        certify_conversion(open_end(tied_llama), export)


def test_large_logits_may_differ_by_more(tied_llama: Path, tmp_path: Path) -> None:
    weights = load_file(tied_llama / "model.safetensors")
    weights["model.norm.weight"] *= 1000.0
    write_export(tmp_path / "loud", weights, tied_llama)
    certify(tmp_path / "loud", transformers_own(tmp_path / "loud", 2e-3))
    assert recorded(tmp_path / "loud")["limit"] > 2e-3
