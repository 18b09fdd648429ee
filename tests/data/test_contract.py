"""The contract: what changes it, what does not, and how a difference is told."""

import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from samples import CONTRACT, TOKENIZERS_OWN, run_config

from astar_megatron.data.chat import TokenizerError
from astar_megatron.data.contract import Contract, ContractError, contract_of, tokenizer_digest
from conversion.folders import ModelFolderError

NAMES = ("this run", "the table")


def _contract(model: str, **sections: dict[str, Any]) -> Contract:
    return contract_of(run_config(**sections | {"model": {"path": model}}))


@pytest.fixture
def model(model_folder: Callable[..., str]) -> str:
    return model_folder(stop=[5])


def test_equal_runs_have_equal_contracts(model: str, tmp_path: Path) -> None:
    copy = str(shutil.copytree(model, tmp_path / "copy"))
    first = _contract(model)
    second = _contract(copy, astar={"beta1": 2.0}, sweep={"num_samples": 32}, train={"num_steps": 1})
    assert first == second
    assert first.digest() == second.digest()
    assert first.difference(second) == []
    assert first.difference(json.loads(json.dumps(first.fields()))) == []


def test_the_digest_of_a_tokenizer_is_of_its_own_files_alone(tmp_path: Path) -> None:
    names = ["added_tokens.json", "merges.txt", "special_tokens_map.json", "tokenizer.json", "tokenizer.model"]
    names += ["tokenizer_config.json", "vocab.json", "vocab.txt"]
    digest = hashlib.sha256()
    for name in names:
        (tmp_path / name).write_text(f"of {name}")
        digest.update(f"{name}\0{len(name) + 3}\0of {name}".encode())
    for name in ("chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "README.md"):
        (tmp_path / name).write_text("no tokenizer's")
    assert tokenizer_digest(tmp_path) == digest.hexdigest()


@pytest.mark.parametrize("name", TOKENIZERS_OWN)
def test_a_tokenizer_s_file_of_any_kind_changes_the_digest(name: str, tmp_path: Path) -> None:
    digests = set()
    for text in ("one", "two"):
        (tmp_path / name).write_text(text)
        digests.add(tokenizer_digest(tmp_path))
    assert len(digests) == 2
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("../blobs/missing")
    with pytest.raises(ModelFolderError, match=r"names \.\./blobs/missing, which is missing: copy it there too"):
        tokenizer_digest(tmp_path)


@pytest.mark.parametrize(
    ("sections", "field"),
    [
        ({"sampling": {"temperature": 0.5}}, "temperature"),
        ({"sampling": {"top_p": 0.9}}, "top p"),
        ({"sampling": {"max_response_tokens": 7}}, "max response tokens"),
        ({"data": {"max_prompt_tokens": 7}}, "max prompt tokens"),
        ({"data": {"suffix": "!"}}, "template digest"),
        ({"reward": {"name": "math"}}, "reward"),
    ],
)
def test_a_configuration_that_changes_the_samples_changes_one_field(
    model: str, sections: dict[str, dict[str, Any]], field: str
) -> None:
    first, second = _contract(model), _contract(model, **sections)
    (line,) = first.difference(second, NAMES)
    assert line.startswith(f"{field}: this run has ")
    assert first.digest() != second.digest()


@pytest.mark.parametrize(
    ("file", "change", "field"),
    [
        ("model.safetensors", lambda data: data[:-1] + b"x", "model digest"),
        ("model.safetensors", lambda data: data.replace(b"F32", b"I32"), "model digest"),
        ("config.json", lambda _: b'{"vocab_size": 1000}', "model digest"),
        ("tokenizer.json", lambda data: data + b"\n", "tokenizer digest"),
        ("generation_config.json", lambda _: b'{"eos_token_id": 6}', "stop token ids"),
        ("chat_template.jinja", lambda _: b"{{ messages[0]['content'] }}", "template digest"),
    ],
    ids=["weights", "type", "configuration", "tokenizer", "stop tokens", "template"],
)
def test_a_changed_model_folder_changes_one_field(
    model: str, tmp_path: Path, file: str, change: Callable[[bytes], bytes], field: str
) -> None:
    path = shutil.copytree(model, tmp_path / "copy") / file
    path.write_bytes(change(path.read_bytes()))
    (line,) = _contract(model).difference(_contract(str(path.parent)))
    assert line.startswith(f"{field}: ")


def test_a_change_of_any_one_tensor_changes_the_model_digest(tied_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tied_llama, tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    digests = {_contract(str(folder)).model_digest}
    for name, tensor in tensors.items():
        save_file(tensors | {name: tensor * 1.25}, folder / "model.safetensors")
        digests.add(_contract(str(folder)).model_digest)
    assert len(digests) == 1 + len(tensors)


def test_the_same_tensors_in_one_file_and_in_several_have_one_model_digest(tied_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tied_llama, tmp_path / "copy")
    tensors = list(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    for number in range(3):
        save_file(dict(tensors[number::3]), folder / f"model-{number}.safetensors", {"by": "another program"})
    assert _contract(str(folder)) == _contract(str(tied_llama))


@pytest.mark.parametrize(("rule", "age"), [({}, "an older"), ({"digest_rule": 3}, "another")])
def test_a_model_digest_of_another_version_is_said_to_be_one(rule: dict[str, int], age: str) -> None:
    stored = {name: value for name, value in CONTRACT.fields().items() if name != "digest_rule"}
    (line,) = CONTRACT.difference(stored | {"model_digest": "f" * 64} | rule, NAMES)
    assert line.startswith(f"model digest: the table is of {age} version of this project")


def test_a_field_that_only_one_side_has_is_a_difference() -> None:
    fields = CONTRACT.fields()
    del fields["top_p"]
    fields["new_rule"] = "x"
    assert CONTRACT.difference(fields) == [
        "top p: this has 1.0, the other none",
        "new rule: this has none, the other x",
    ]
    assert dataclasses.replace(CONTRACT, top_p=0.5).difference(CONTRACT) == ["top p: this has 0.5, the other 1.0"]


def test_the_day_of_the_prompts_is_a_field_only_where_the_template_writes_it(
    model: str, model_folder: Callable[..., str]
) -> None:
    assert _contract(model, data={"date": "2026-11-28"}) == _contract(model)
    asks = model_folder(template="{{ strftime_now('%d %b %Y') }}<u>")
    first, second = (_contract(asks, data={"date": f"2026-11-{day}"}) for day in (28, 29))
    for contract, day in ((first, "2026-11-28"), (_contract(asks), "none")):
        assert contract.difference(second, NAMES) == [f"date: this run has {day}, the table 2026-11-29"]


def test_special_tokens_that_rewards_read_are_a_field_only_where_there_are_some(
    model_folder: Callable[..., str],
) -> None:
    assert _contract(model_folder(stop=[1])).fields()["kept_token_ids"] == [2]
    assert "kept_token_ids" not in _contract(model_folder(stop=[1, 2])).fields()
    many = _contract(model_folder(special=[f"<{i}>" for i in range(9)]))
    (line,) = many.difference(many.fields() | {"kept_token_ids": [1]})
    assert re.fullmatch(r"kept token ids: this has 11 of digest [0-9a-f]{12}\.\.\., the other \[1\]", line)


def test_a_model_folder_without_whole_weights_is_refused(model: str, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "copy")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (
        whole[:20],
        whole[:-1],
        b"",
        whole.replace(b"[0, 64]", b"[-1,64]"),
        whole.replace(b"dtype", b"dtyqe"),
    ):
        weights.write_bytes(damaged)
        with pytest.raises(ContractError, match="not a whole safetensors file"):
            _contract(str(folder))
    weights.unlink()
    with pytest.raises(ContractError, match=r"no \*\.safetensors"):
        _contract(str(folder))
    with pytest.raises(TokenizerError, match="no such folder"):
        _contract(str(tmp_path / "none"))
