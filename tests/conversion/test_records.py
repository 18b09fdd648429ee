"""What conversion.json records is compared with what is there; what is written, with what was read."""

import dataclasses
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from exports import write_export
from safetensors.torch import save_file
from tiny_models import EXPERTS, FAMILIES, config, random_weights, write_folder

from conversion import hf, rewrite
from conversion.checkpoint_index import DistributedCheckpointError
from conversion.ends import HuggingFaceEnd, open_end
from conversion.families import model_from_config
from conversion.folders import ModelFolderError, read_record
from conversion.ledger import config_verdict, weights_verdict
from conversion.tiles import ParallelLayout
from conversion.verify import DIGEST_RULE

NAME = "model.layers.1.mlp.experts.4.up_proj.weight"


@pytest.fixture
def exported(megatron: Path, tmp_path: Path) -> Path:
    rewrite.write_hf(open_end(megatron), tmp_path / "exported")
    return tmp_path / "exported"


def change(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("kind", ["megatron", "exported"])
def test_a_configuration_that_is_not_as_recorded_is_not_converted(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    change(folder / "config.json", max_position_embeddings=64, dtype="bfloat16", eos_token_id=3, intermediate_size=9)
    assert config_verdict(open_end(folder)) == "config.json computes as recorded in conversion.json"
    rewrite.write_hf(open_end(folder), tmp_path / "before")
    change(folder / "config.json", rms_norm_eps=0.5, rope_theta=123.0, norm_topk_prob=False)
    words = r"norm_topk_prob True and False; rms_norm_eps 1e-06 and 0\.5; rope_theta 10000\.0 and 123\.0: restore conf"
    for write in (
        lambda: rewrite.write_hf(open_end(folder), tmp_path / "out"),
        lambda: rewrite.write_megatron(open_end(folder), tmp_path / "out", ParallelLayout()),
    ):
        with pytest.raises(ModelFolderError, match=rf"{kind}/conversion\.json records another computation .*{words}"):
            write()
    assert not (tmp_path / "out").exists()
    assert "norm_topk_prob True and False" in config_verdict(open_end(folder))
    with pytest.raises(rewrite.MismatchError, match=r"compute differently.*norm_topk_prob False and True"):
        rewrite.compare(open_end(folder), open_end(tmp_path / "before"))
    change(folder / "conversion.json", config=[])
    with pytest.raises(ModelFolderError, match="config is no JSON object"):
        rewrite.write_hf(open_end(folder), tmp_path / "out")
    change(folder / "conversion.json", config=None)  # as in a record of before
    rewrite.write_hf(open_end(folder), tmp_path / "out")
    assert "nothing records what config.json" in config_verdict(open_end(folder))


def test_exports_of_training_record_what_their_configuration_computes(tmp_path: Path) -> None:
    for family in FAMILIES:
        model = model_from_config(config(family))
        source = write_folder(tmp_path / "source", model, random_weights(model))
        write_export(tmp_path / family, random_weights(model), source)
        assert (read_record(tmp_path / family) or {})["config"] == model.computation()
    scaling = (read_record(tmp_path / "llama3") or {})["config"]["rope_scaling"]
    assert (scaling["factor"], scaling["original_max_position_embeddings"]) == (8.0, 24)


def flip_bit(folder: Path) -> None:
    """Change one bit of NAME, wherever it lies."""
    values = open_end(folder).rows(NAME, 7, 8).contiguous().view(torch.uint8).numpy().tobytes()
    for file in folder.iterdir():
        data = bytearray(file.read_bytes())
        if (at := data.find(values)) >= 0:
            data[at + 5] ^= 1
            file.write_bytes(data)
            return
    raise AssertionError(f"{folder} does not hold {NAME}")


@pytest.mark.parametrize("kind", ["megatron", "exported"])
def test_a_folder_that_is_not_as_recorded_is_not_converted(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    assert weights_verdict(open_end(folder), rewrite.read_through(open_end(folder)).digests()).startswith("as recorded")
    flip_bit(folder)
    before = sorted(path.name for path in tmp_path.iterdir())
    for write in (
        lambda: rewrite.write_hf(open_end(folder), tmp_path / "out"),
        lambda: rewrite.write_megatron(open_end(folder), tmp_path / "out", ParallelLayout()),
    ):
        with pytest.raises(ModelFolderError, match=rf"{kind}: {NAME}: not what conversion\.json there records"):
            write()
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert weights_verdict(open_end(folder), rewrite.read_through(open_end(folder)).digests()).endswith(f": {NAME}")
    (folder / "conversion.json").unlink()  # as the message says, for a change on purpose
    rewrite.write_hf(open_end(folder), tmp_path / "out")
    assert "nothing records" in weights_verdict(open_end(folder), rewrite.read_through(open_end(folder)).digests())


def test_a_record_of_another_type_or_that_is_none_is_refused(exported: Path, tmp_path: Path) -> None:
    of_type, of_kind = "weights in bfloat16, these are in float32", "digests are no JSON object"
    for changes, words in (({"dtype": "bfloat16"}, of_type), ({"digests": [1]}, of_kind)):
        shutil.copytree(exported, tmp_path / "copy")
        change(tmp_path / "copy" / "conversion.json", **changes)
        with pytest.raises(ModelFolderError, match=words):
            rewrite.write_hf(open_end(tmp_path / "copy"), tmp_path / "out")
        assert words in weights_verdict(open_end(tmp_path / "copy"), {})
        shutil.rmtree(tmp_path / "copy")


@pytest.mark.parametrize("rule", [None, "elements"])
def test_digests_by_another_rule_are_refused_by_its_name(rule: str | None, exported: Path, tmp_path: Path) -> None:
    digests = (read_record(exported) or {})["digests"]
    change(exported / "conversion.json", digest_rule=rule)
    words = f"its digests are by the rule {rule!r}, expected {DIGEST_RULE!r}: remove it if the weights are sound"
    assert words in weights_verdict(open_end(exported), digests)
    with pytest.raises(ModelFolderError, match=words):
        rewrite.write_hf(open_end(exported), tmp_path / "out")


def test_a_write_in_the_wrong_place_is_found(
    megatron: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files are opened again and read by the way that any reader takes."""
    write = hf.Export.write
    before = sorted(path.name for path in tmp_path.iterdir())

    def shifted(export: hf.Export, name: str, row: int, values: torch.Tensor) -> None:
        write(export, name, row, values.roll(1, 0) if name == NAME else values)

    monkeypatch.setattr(hf.Export, "write", shifted)
    with pytest.raises(ModelFolderError, match=rf"{NAME}.* is not written as it was read"):
        rewrite.write_hf(open_end(megatron), tmp_path / "out")
    monkeypatch.setattr(rewrite._Assembled, "_place", _swapped(rewrite._Assembled._place))
    with pytest.raises(ModelFolderError, match="is not written as it was read"):
        rewrite.write_megatron(open_end(exported), tmp_path / "out", ParallelLayout())
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def _swapped(place: Callable) -> Callable:
    """Experts 0 and 1 in each other's places: every weight is read once, and digests of what is read are right."""

    def wrong(self: object, stored: str, index: tuple) -> tuple:
        name, part = place(self, stored, index)
        for expert, other in (("local_experts.0.", "local_experts.1."), ("local_experts.1.", "local_experts.0.")):
            if expert in name:
                return name.replace(expert, other), part
        return name, part

    return wrong


def test_an_export_says_which_folder_and_layout_it_came_from(
    megatron: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(megatron)
    rewrite.write_hf(open_end("."), tmp_path / "out")
    record = read_record(tmp_path / "out") or {}
    assert record["source"] == "megatron"
    assert (record["layout"]["tensor"], record["layout"]["expert"]) == (2, 2)
    cached = shutil.copytree(megatron, tmp_path / "models--Org--Base-1B" / "snapshots" / "0a1b")  # as the hub does
    rewrite.write_hf(open_end(cached), tmp_path / "out")
    assert (read_record(tmp_path / "out") or {})["source"] == "Org/Base-1B"
    (megatron / "conversion.json").unlink()  # a checkpoint of training says it elsewhere
    (megatron / "progress.json").write_text(json.dumps({"layout": {"tensor": 5}}))
    rewrite.write_hf(open_end(megatron), tmp_path / "out")
    assert (read_record(tmp_path / "out") or {})["layout"] == {"tensor": 5}
    for content, words in (
        ("{", r"progress\.json is no JSON"),
        ("[]", r"progress\.json: expected a JSON object, got list"),
        ('{"layout": [5]}', r"progress\.json: layout is no JSON object"),
    ):
        (megatron / "progress.json").write_text(content)
        with pytest.raises(ModelFolderError, match=words):
            rewrite.write_hf(open_end(megatron), tmp_path / "out")


def test_a_folder_named_as_like_is_recorded_and_may_not_contradict_the_checkpoint_s_own(
    megatron: Path, tmp_path: Path
) -> None:
    other = write_folder(tmp_path / "other", EXPERTS, {})
    rewrite.write_hf(open_end(megatron, like=other), tmp_path / "out")
    assert (read_record(tmp_path / "out") or {})["like"] == "other"
    rewrite.write_hf(open_end(megatron, like=megatron), tmp_path / "own")
    assert "like" not in (read_record(tmp_path / "own") or {})
    change(other / "config.json", rms_norm_eps=0.1, rope_theta=5e5)
    words = r"megatron/config\.json and .*other/config\.json.* rms_norm_eps 1e-06 and 0\.1; rope_theta 10000\.0 and 50"
    with pytest.raises(ValueError, match=words + ".*leave out --like, or, if the first is wrong, remove it"):
        open_end(megatron, like=other)
    (megatron / "config.json").unlink()  # as the message says; what its record says stands
    with pytest.raises(ModelFolderError, match=r"records another computation than .*other/config\.json says"):
        rewrite.write_hf(open_end(megatron, like=other), tmp_path / "out")
    (megatron / "conversion.json").unlink()
    rewrite.write_hf(open_end(megatron, like=other), tmp_path / "out")


def test_a_stored_head_of_a_tied_model_is_the_embedding_or_refused(tmp_path: Path) -> None:
    model = model_from_config(config(tie_word_embeddings=True, vocab_size=2111))
    weights = random_weights(model)
    head = weights["model.embed_tokens.weight"].clone()
    source = write_folder(tmp_path / "source", model, weights | {"lm_head.weight": head})
    rewrite.compare(HuggingFaceEnd(source), HuggingFaceEnd(source))
    head[2110, 3] *= -1.0
    for other in (head, weights["model.embed_tokens.weight"].half(), head[:2000].clone()):
        save_file(weights | {"lm_head.weight": other}, source / hf.WEIGHTS)
        with pytest.raises(ModelFolderError, match=r"lm_head\.weight that is not model\.embed_tokens\.weight"):
            open_end(source)


def test_a_checkpoint_s_own_head_is_not_dropped_for_a_tied_configuration(megatron: Path) -> None:
    settings = json.loads((megatron / "config.json").read_text())
    (megatron / "config.json").write_text(json.dumps(settings | {"tie_word_embeddings": True}))
    with pytest.raises(ValueError, match=r"holds output_layer\.weight, a head of its own"):
        open_end(megatron)


def test_errors_of_files_are_said_in_words_of_ours(megatron: Path, exported: Path) -> None:
    (exported / hf.WEIGHTS).unlink()
    (exported / hf.WEIGHTS).mkdir()
    with pytest.raises(ModelFolderError, match=r"Is a directory"):
        open_end(exported)
    file = min(megatron.glob("*.distcp"))
    data = file.read_bytes()
    file.write_bytes(data.replace(b"torch._utils", b"torch.-utils").replace(b"_rebuild_tensor", b"_rebuild_tenser"))
    with pytest.raises(DistributedCheckpointError, match=r"distcp is damaged: what begins at byte \d+ is no") as caught:
        rewrite.read_through(open_end(megatron))
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("content", [{"a": 1}, None, [torch.zeros(2)], "text"])
def test_a_chunk_that_is_no_tensor_is_damaged(content: object, megatron: Path) -> None:
    torch.save(content, megatron / "odd.distcp")
    index = pickle.loads((megatron / ".metadata").read_bytes())
    for key, place in index.storage_data.items():
        size = (megatron / "odd.distcp").stat().st_size
        index.storage_data[key] = dataclasses.replace(place, relative_path="odd.distcp", offset=0, length=size)
    (megatron / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(
        DistributedCheckpointError, match=r"odd\.distcp is damaged: what begins at byte 0 is no part of"
    ):
        rewrite.read_through(open_end(megatron))
