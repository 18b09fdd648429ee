"""The contract: what changes it, what does not, and how a difference is told."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from samples import CONTRACT

from astar_megatron.config import validate
from astar_megatron.data.chat import TokenizerError
from astar_megatron.data.contract import Contract, ContractError, contract_of

NAMES = ("this run", "the table")


def _contract(model: str, **sections: dict[str, Any]) -> Contract:
    tree: dict[str, Any] = {
        "run_dir": "/tmp/run",
        "model": {"path": model},
        "data": {"path": "data.jsonl"},
        "reward": {"name": "last_number"},
    }
    for name, section in sections.items():
        tree[name] = tree.get(name, {}) | section
    return contract_of(validate(tree))


@pytest.fixture
def model(model_folder: Callable[..., str]) -> str:
    return model_folder(stop=[5])


def test_equal_runs_have_equal_contracts(model: str, tmp_path: Path) -> None:
    copy = str(shutil.copytree(model, tmp_path / "copy"))
    first, second = (
        _contract(model),
        _contract(copy, astar={"beta1": 2.0}, sweep={"num_samples": 32}, train={"num_steps": 1}),
    )
    assert first == second
    assert first.digest() == second.digest()
    assert first.difference(second) == []
    assert first.difference(json.loads(json.dumps(first.fields()))) == []


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


def _weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")


def _type(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b"F32", b"I32"))


def _config(folder: Path) -> None:
    (folder / "config.json").write_text('{"vocab_size": 1000}')


def _tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text() + "\n")


def _stop(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": 6}')


def _template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (_weights, "model digest"),
        (_type, "model digest"),
        (_config, "model digest"),
        (_tokenizer, "tokenizer digest"),
        (_stop, "stop token ids"),
        (_template, "template digest"),
    ],
)
def test_a_changed_model_folder_changes_one_field(
    model: str, tmp_path: Path, change: Callable[[Path], None], field: str
) -> None:
    folder = shutil.copytree(model, tmp_path / "copy")
    change(folder)
    (line,) = _contract(model).difference(_contract(str(folder)))
    assert line.startswith(f"{field}: ")


def test_a_field_that_only_one_side_has_is_a_difference() -> None:
    fields = CONTRACT.fields()
    del fields["top_p"]
    fields["new_rule"] = "x"
    assert CONTRACT.difference(fields) == [
        "top p: this has 1.0, the other nothing recorded",
        "new rule: this has nothing recorded, the other x",
    ]
    assert dataclasses.replace(CONTRACT, top_p=0.5).difference(CONTRACT) == ["top p: this has 0.5, the other 1.0"]


def test_the_day_of_the_prompts_is_a_field_only_where_the_template_writes_it(
    model: str, model_folder: Callable[..., str]
) -> None:
    assert _contract(model, data={"date": "2026-11-28"}) == _contract(model)
    asks = model_folder(template="{{ strftime_now('%d %b %Y') }}<u>")
    first, second = (_contract(asks, data={"date": f"2026-11-{day}"}) for day in (28, 29))
    for contract, day in ((first, "2026-11-28"), (_contract(asks), "nothing recorded")):
        assert contract.difference(second, NAMES) == [f"date: this run has {day}, the table 2026-11-29"]
    older = {name: value for name, value in second.fields().items() if name != "date"}
    assert first.difference(older) == []  # its prompts' uids have the day


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
    weights.write_bytes(weights.read_bytes()[:20])
    with pytest.raises(ContractError, match="not a whole safetensors file"):
        _contract(str(folder))
    weights.unlink()
    with pytest.raises(ContractError, match=r"no \*\.safetensors"):
        _contract(str(folder))
    with pytest.raises(TokenizerError, match="no such folder"):
        _contract(str(tmp_path / "none"))
