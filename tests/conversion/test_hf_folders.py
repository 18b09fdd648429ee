"""HF folders: what is read, what is written, and every way a folder can be wrong."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from exports import write_export
from safetensors.torch import load_file, save_file
from tiny_models import EXPERTS, cached, config, random_weights, write_folder
from torch import Tensor

from conversion import folders, hf
from conversion.families import Model, model_from_config
from conversion.hf import ModelFolderError
from conversion.plan import plan
from conversion.verify import tensor_digests
from conversion.weight_files import check_engines_read

MODEL = model_from_config(config())
WEIGHTS = random_weights(MODEL)


def loaded(folder: Path, model: Model = MODEL, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    tensors = {name: torch.empty(shape, dtype=dtype) for name, shape in model.parameters().items()}
    hf.load(folder, plan(model.hf_tiles(), model.hf_tiles()), 0, tensors)
    return tensors


def assert_same(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = write_folder(tmp_path / "source", MODEL, WEIGHTS)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture
def sharded(source: Path, tmp_path: Path) -> Path:
    write_export(tmp_path / "sharded", WEIGHTS, source, max_shard_bytes=30_000)
    return tmp_path / "sharded"


def test_shards_and_links_read_like_one_file(source: Path, sharded: Path, tmp_path: Path) -> None:
    assert len(list(sharded.glob("*.safetensors"))) > 2 and not (sharded / hf.WEIGHTS).exists()
    assert_same(loaded(sharded), loaded(source))
    assert_same(loaded(cached(sharded, tmp_path)), WEIGHTS)


def test_transformers_opens_an_export_in_the_dtype_it_was_written_in(source: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    halves = {name: tensor.half() for name, tensor in WEIGHTS.items()}
    write_export(tmp_path / "export", halves, source, max_shard_bytes=30_000)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype="auto")
    assert_same(dict(model.state_dict()), halves)
    assert (tmp_path / "export/chat_template.jinja").read_text() == "{{ messages }}"
    assert (tmp_path / "export/tokenizer.json").exists()


@pytest.mark.parametrize("keys", [(), ("dtype",), ("torch_dtype",), ("dtype", "torch_dtype")])
def test_an_export_says_its_type_under_the_names_of_its_source(keys: tuple[str, ...], tmp_path: Path) -> None:
    from transformers import AutoConfig

    model = model_from_config(config(**dict.fromkeys(keys, "float32")))
    source = write_folder(tmp_path / "source", model, random_weights(model))
    halves = {name: tensor.bfloat16() for name, tensor in loaded(source, model).items()}
    write_export(tmp_path / "export", halves, source)
    written = json.loads((tmp_path / "export/config.json").read_text())
    assert {key: written[key] for key in written if key.endswith("dtype")} == dict.fromkeys(
        keys or ["dtype"], "bfloat16"
    )
    assert AutoConfig.from_pretrained(tmp_path / "export").dtype == torch.bfloat16


def test_an_export_has_the_named_templates_and_every_file_of_a_tokenizer(source: Path, tmp_path: Path) -> None:
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates/tool_use.jinja").write_text("TOOLS {{ messages }}")
    (source / "vocab.txt").write_text("a\n")
    export = tmp_path / "export"
    for _ in range(2):  # the second takes the place of the first
        write_export(export, WEIGHTS, source, max_shard_bytes=30_000)
        assert (export / "additional_chat_templates/tool_use.jinja").read_text() == "TOOLS {{ messages }}"
        assert (export / "vocab.txt").read_text() == "a\n"
        assert folders.strangers(export) == []
    assert {"vocab.txt", "additional_chat_templates/tool_use.jinja"} <= set(folders.files(export))
    (export / "additional_chat_templates/notes.txt").write_text("mine")
    (export / "additional_chat_templates/mine.jinja").mkdir()
    own = [f"additional_chat_templates/{name}" for name in ("mine.jinja", "notes.txt")]
    assert folders.strangers(export) == own
    with pytest.raises(folders.ModelFolderError, match=f"holds files that no export has: {', '.join(own)}"):
        folders.check_destination(export)


def test_a_tied_head_is_not_written_and_an_old_one_not_read(tmp_path: Path) -> None:
    model = model_from_config(config(tie_word_embeddings=True))
    weights = random_weights(model)
    with_head = weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    source = write_folder(tmp_path / "source", model, with_head)
    assert_same(loaded(source, model), weights)
    write_export(tmp_path / "export", with_head, source)
    assert_same(load_file(tmp_path / "export" / hf.WEIGHTS), weights)


def test_an_export_replaces_an_export_and_nothing_else(source: Path, tmp_path: Path) -> None:
    doubled = {name: 2 * tensor for name, tensor in WEIGHTS.items()}
    write_export(tmp_path / "export", WEIGHTS, source, max_shard_bytes=30_000)
    write_export(tmp_path / "export", doubled, source)
    assert_same(loaded(tmp_path / "export"), doubled)
    assert not list((tmp_path / "export").glob("model-*"))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter1.txt").write_text("years of work")
    model = {path.name: path.read_bytes() for path in source.iterdir()}
    for place in (tmp_path / "thesis", tmp_path / "thesis/chapter1.txt", source):
        with pytest.raises(ModelFolderError, match="is no export of this project"):
            write_export(place, WEIGHTS, source)
    assert (tmp_path / "thesis/chapter1.txt").read_text() == "years of work"
    assert {path.name: path.read_bytes() for path in source.iterdir()} == model


def test_an_export_is_filled_as_the_weights_arrive_and_says_what_it_holds(source: Path, tmp_path: Path) -> None:
    write_export(tmp_path / "saved", WEIGHTS, source)
    with hf.writing(tmp_path / "filled", source, torch.float32, max_shard_bytes=30_000) as export:
        assert not (tmp_path / "filled").exists()
        for name, tensor in reversed(export.tensors.items()):
            for row in range(len(tensor)):
                tensor[row] = WEIGHTS[name][row]
        export.record["layout"] = {"tensor": 2}
    assert_same(loaded(tmp_path / "filled"), WEIGHTS)
    records = [json.loads((tmp_path / name / hf.RECORD).read_text()) for name in ("saved", "filled")]
    assert records[1].pop("layout") == {"tensor": 2}
    assert records[0] == records[1]
    assert records[0]["digests"] == tensor_digests(WEIGHTS)
    assert (records[0]["source"], records[0]["dtype"]) == ("source", "float32")


def test_an_export_for_which_there_is_no_room_leaves_nothing(source: Path, tmp_path: Path) -> None:
    room = os.statvfs(tmp_path)
    large = model_from_config(config(vocab_size=room.f_blocks * room.f_frsize // 48))
    (source / "config.json").write_text(json.dumps(large.config))
    words = r"no room for the \d+ bytes of model\.safetensors"
    with pytest.raises(OSError, match=words), hf.writing(tmp_path / "export", source, torch.float32, float("inf")):
        raise AssertionError("nothing can be filled")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_index_and_files_that_contradict_each_other_are_refused(sharded: Path) -> None:
    path = sharded / hf.INDEX
    weight_map = json.loads(path.read_text())["weight_map"]
    own = weight_map["model.norm.weight"]
    other = next(file for file in weight_map.values() if file != own)
    without = {name: file for name, file in weight_map.items() if name != "model.norm.weight"}
    for changed, message in (
        (weight_map | {"model.norm.weight": other}, r"holds model\.norm\.weight, but it does not"),
        (weight_map | {"model.norm.weight": "../escape.safetensors"}, "not a file of this folder"),
        (without, r"holds a model\.norm\.weight that model\.safetensors\.index\.json does not place there"),
        ([], "no safetensors index"),
        (weight_map | {"model.norm.weight": 3}, "no safetensors index.*names the file 3"),
    ):
        path.write_text(json.dumps({"weight_map": changed}))
        with pytest.raises(ModelFolderError, match=message):
            loaded(sharded)
    path.write_text("{")
    with pytest.raises(ModelFolderError, match="no safetensors index"):
        loaded(sharded)
    path.write_text(json.dumps({"weight_map": weight_map}))
    # transformers and this project would take the one that the index names, vLLM the one it reads last
    save_file(load_file(sharded / other) | {"model.norm.weight": torch.zeros(48)}, sharded / other)
    with pytest.raises(ModelFolderError, match=rf"{other} holds a model\.norm\.weight that .* does not place there"):
        loaded(sharded)
    (sharded / other).unlink()
    with pytest.raises(ModelFolderError, match=rf"names {other}, which is missing"):
        loaded(sharded)


def test_one_file_beside_an_index_of_others_is_refused(sharded: Path) -> None:
    (sharded / hf.WEIGHTS).write_bytes(b"")
    words = r"holds model\.safetensors beside model\.safetensors\.index\.json, which"
    with pytest.raises(ModelFolderError, match=words):
        loaded(sharded)


def test_one_file_that_is_a_shard_of_an_index_is_refused(sharded: Path) -> None:
    """transformers would read it alone."""
    weight_map = json.loads((sharded / hf.INDEX).read_text())["weight_map"]
    shard = weight_map["model.norm.weight"]
    (sharded / shard).rename(sharded / hf.WEIGHTS)
    renamed = {name: hf.WEIGHTS if file == shard else file for name, file in weight_map.items()}
    (sharded / hf.INDEX).write_text(json.dumps({"weight_map": renamed}))
    with pytest.raises(ModelFolderError, match=r"holds model\.safetensors beside .* give it another name, there too"):
        loaded(sharded)


def test_an_index_of_the_one_file_is_none_to_choose_between(source: Path) -> None:
    (source / hf.INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(WEIGHTS, hf.WEIGHTS)}))
    assert_same(loaded(source), WEIGHTS)


def test_a_tied_model_under_the_name_of_its_head_is_named(tmp_path: Path) -> None:
    model = model_from_config(config(tie_word_embeddings=True))
    weights = random_weights(model)
    weights[hf.HEAD] = weights.pop(hf.EMBEDDING)
    folder = write_folder(tmp_path, model, weights)
    with pytest.raises(ModelFolderError, match=rf"the tied {hf.EMBEDDING} under the name {hf.HEAD} alone, .*save_pr"):
        loaded(folder, model)


def test_experts_in_one_tensor_are_named_and_as_transformers_saves_them_read(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    weights = random_weights(EXPERTS)
    transformer = AutoModelForCausalLM.from_pretrained(write_folder(tmp_path / "source", EXPERTS, weights))
    transformer.save_pretrained(tmp_path / "fused", save_original_format=False)
    with pytest.raises(ModelFolderError, match=r"all experts of a layer in one tensor, .*from a copy by from_config"):
        loaded(tmp_path / "fused", EXPERTS)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "fused")
    copy = AutoModelForCausalLM.from_config(opened.config)
    copy.load_state_dict(opened.state_dict())
    copy.save_pretrained(tmp_path / "saved")
    assert_same(loaded(tmp_path / "saved", EXPERTS), weights)


@pytest.mark.parametrize("name", ["backup.safetensors", "consolidated.safetensors", "adapter_model.safetensors"])
def test_a_file_that_vllm_would_load_too_is_refused_for_engines(name: str, source: Path, sharded: Path) -> None:
    for folder in (source, sharded):
        check_engines_read(folder)
        save_file({"model.norm.weight": torch.zeros(48)}, folder / name)
    with pytest.raises(
        ModelFolderError, match=rf"holds {name} beside model\.safetensors, and no model.*move the other"
    ):
        check_engines_read(source)
    check_engines_read(sharded)  # vLLM reads what the index names
    assert_same(loaded(source), WEIGHTS)
    assert_same(loaded(sharded), WEIGHTS)


def test_that_an_adapter_is_left_out_is_said(source: Path, caplog: pytest.LogCaptureFixture) -> None:
    hf.check(source, MODEL.parameters())
    assert not caplog.messages
    (source / "adapter_config.json").write_text("{}")
    (source / "adapter_model.bin").write_bytes(b"")
    for _ in range(2):
        hf.check(source, MODEL.parameters())
    (warning,) = caplog.messages  # once
    assert warning.startswith(f"{source}: adapter_config.json and adapter_model.bin: left out; merge the adapter")


def with_tensor(name: str, tensor: Tensor) -> Callable[[Path], object]:
    """What writes the weights to a file with one of them, or one more, as given."""
    return lambda file: save_file(WEIGHTS | {name: tensor}, file)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda file: os.truncate(file, file.stat().st_size - 100), r"model\.safetensors is damaged, truncated"),
        (lambda file: file.write_bytes(b""), "damaged, truncated"),
        (lambda file: file.unlink(), "has neither"),
        (lambda file: file.rename(file.with_suffix(".bin")), r"model\.bin is a pickle checkpoint"),
        (with_tensor("model.norm.weight", torch.zeros(40)), r"norm\.weight has shape \(40,\), expected \(48,\)"),
        (with_tensor("model.norm.weight", torch.zeros(48, dtype=torch.int8)), "has dtype I8"),
        (with_tensor("model.layers.0.self_attn.q_proj.bias", torch.zeros(48)), r"holds .*\.self_attn\.q_proj\.bias"),
    ],
    ids=["truncated", "empty", "gone", "pickle", "shape", "type", "no parameter"],
)
def test_a_file_of_other_weights_than_the_model_s_is_named(
    spoil: Callable[[Path], object], message: str, source: Path
) -> None:
    spoil(source / hf.WEIGHTS)
    with pytest.raises(ModelFolderError, match=message):
        loaded(source)
