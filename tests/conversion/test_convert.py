"""Folders of both kinds from each other: bitwise round trips, comparison, and refusal of what is damaged or hostile."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import samples
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_models import cached, fits, layouts, models, random_weights, write_folder

from astar_megatron import convert
from conversion import rewrite
from conversion.checkpoint_index import DistributedCheckpointError
from conversion.ends import HuggingFaceEnd, MegatronEnd, open_end
from conversion.families import Model
from conversion.folders import ModelFolderError, companions
from conversion.tiles import ParallelLayout
from conversion.torch_dist import CheckpointReader
from conversion.verify import tensor_digests


@pytest.mark.parametrize("kind", ["tied_llama", "untied_qwen2"])
@pytest.mark.parametrize("tensor", [1, 2])
def test_there_and_back_is_bitwise_equal(
    kind: str, tensor: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(kind)
    rewrite.write_megatron(HuggingFaceEnd(source), tmp_path / "megatron", ParallelLayout(tensor=tensor))
    rewrite.write_megatron(open_end(tmp_path / "megatron"), tmp_path / "reshaped", ParallelLayout(tensor=3 - tensor))
    rewrite.write_hf(open_end(tmp_path / "reshaped"), tmp_path / "back")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "back"))
    before.pop("lm_head.weight", None) if kind == "tied_llama" else None
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((tmp_path / "back" / "conversion.json").read_text())["source_kind"] == "Megatron"


def test_every_file_of_a_tokenizer_goes_along(tied_llama: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tied_llama, tmp_path / "source")
    for name in samples.TOKENIZERS_OWN:
        (source / name).write_text(name)
    rewrite.write_megatron(HuggingFaceEnd(source), tmp_path / "megatron", ParallelLayout())
    rewrite.write_hf(open_end(tmp_path / "megatron"), tmp_path / "back")
    rewrite.write_hf(open_end(tmp_path / "megatron"), tmp_path / "back")  # an export with them may be replaced
    assert [(tmp_path / "back" / name).read_text() for name in samples.TOKENIZERS_OWN] == samples.TOKENIZERS_OWN
    assert companions(tmp_path / "back") == companions(source)


@pytest.mark.parametrize("name", ["tokenizer.model", "generation_config.json", "additional_chat_templates/tool.jinja"])
def test_a_link_to_a_file_that_is_missing_is_refused_before_anything_is_written(
    name: str, tied_llama: Path, tmp_path: Path
) -> None:
    """A copy of a part of the hub's cache has such links."""
    source = shutil.copytree(tied_llama, tmp_path / "source")
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to("../blobs/missing")
    end = open_end(source)
    for write in (
        lambda: rewrite.write_hf(end, tmp_path / "out"),
        lambda: rewrite.write_megatron(end, tmp_path / "out", ParallelLayout()),
        lambda: rewrite.preview(end, None),
    ):
        with pytest.raises(ModelFolderError, match=f"{name} names ../blobs/missing, which is missing: copy it there"):
            write()
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("name", ["vocab.txt", "my.codes", "additional_chat_templates/tool.jinja"])
@pytest.mark.parametrize("is_cached", [False, True])
def test_a_link_out_of_the_model_s_folder_is_refused_before_anything_is_written(
    name: str, *, is_cached: bool, tied_llama: Path, tmp_path: Path
) -> None:
    """A model from elsewhere could have any file of this machine copied into an export, and sent to the hub."""
    (tmp_path / "private").write_text("password")
    source = cached(tied_llama, tmp_path) if is_cached else shutil.copytree(tied_llama, tmp_path / "source")
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).symlink_to(tmp_path / "private")
    before, end = sorted(tmp_path.iterdir()), open_end(source)
    for write in (
        lambda: rewrite.write_hf(end, tmp_path / "out"),
        lambda: rewrite.write_megatron(end, tmp_path / "out", ParallelLayout()),
        lambda: rewrite.preview(end, None),
    ):
        with pytest.raises(ModelFolderError, match=f"{name} is a link to .*/private, .*, copy the file there in"):
            write()
    assert sorted(tmp_path.iterdir()) == before


def test_a_link_in_a_model_s_folder_and_weights_on_another_disk_are_followed(tied_llama: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tied_llama, tmp_path / "source")
    (source / "model.safetensors").rename(tmp_path / "weights")
    (source / "model.safetensors").symlink_to(tmp_path / "weights")
    (source / "vocab.txt").symlink_to("tokenizer.json")
    rewrite.write_hf(open_end(source), tmp_path / "out")
    assert (tmp_path / "out" / "vocab.txt").read_bytes() == (source / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("subfolder", ["", "half/of two"])
def test_the_hub_s_cache_may_hold_a_model_in_a_subfolder_and_its_files_on_another_disk(
    subfolder: str, tied_llama: Path, tmp_path: Path
) -> None:
    source = cached(tied_llama, tmp_path, subfolder)
    blobs = tmp_path / "models--Org--Base-1B" / "blobs"
    blobs.rename(tmp_path / "disk")
    blobs.symlink_to(tmp_path / "disk")
    rewrite.write_hf(open_end(source), tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tied_llama / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_are_for_whom_the_umask_lets_them_be(mask: int, tied_llama: Path, tmp_path: Path) -> None:
    with samples.umask_of(mask):
        rewrite.write_megatron(HuggingFaceEnd(tied_llama), tmp_path / "megatron", ParallelLayout())
        rewrite.write_hf(open_end(tmp_path / "megatron"), tmp_path / "hf")
        assert samples.unlike_the_umask(tmp_path) == []


def test_every_value_is_written_once_and_padding_is_zero(tied_llama: Path, tmp_path: Path) -> None:
    model = HuggingFaceEnd(tied_llama).model
    rewrite.write_megatron(HuggingFaceEnd(tied_llama), tmp_path / "megatron", ParallelLayout(tensor=2))
    reader = CheckpointReader(tmp_path / "megatron")
    (rows, columns) = reader.shapes()["embedding.word_embeddings.weight"]
    assert (rows, model.vocab_size) == (264, 263)
    assert not reader.read("embedding.word_embeddings.weight", ((263, 264), (0, columns))).any()
    sizes = sum(torch.Size(shape).numel() for shape in reader.shapes().values())
    assert sizes == model.num_parameters() + columns


def test_an_index_that_would_run_code_is_refused(tied_llama: Path, tmp_path: Path) -> None:
    rewrite.write_megatron(HuggingFaceEnd(tied_llama), tmp_path / "megatron", ParallelLayout())

    class Hostile:
        def __reduce__(self) -> object:
            return os.mkdir, (str(tmp_path / "owned"),)

    (tmp_path / "megatron" / ".metadata").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(DistributedCheckpointError, match="mkdir, which no index"):
        open_end(tmp_path / "megatron")
    assert not (tmp_path / "owned").exists()


def test_a_truncated_chunk_is_named(tied_llama: Path, tmp_path: Path) -> None:
    rewrite.write_megatron(HuggingFaceEnd(tied_llama), tmp_path / "megatron", ParallelLayout())
    file = min((tmp_path / "megatron").glob("*.distcp"))
    data = file.read_bytes()
    os.truncate(file, len(data) // 2)
    with pytest.raises(DistributedCheckpointError, match=f"{file.name} is truncated: .*, {len(data) // 2} there"):
        open_end(tmp_path / "megatron")
    file.write_bytes(bytes(len(data)))
    with pytest.raises(DistributedCheckpointError, match=f"{file.name} is damaged"):
        rewrite.write_hf(open_end(tmp_path / "megatron"), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    file.unlink()
    with pytest.raises(DistributedCheckpointError, match=f"{file.name} is missing"):
        open_end(tmp_path / "megatron")


def test_a_checkpoint_without_configuration_needs_a_folder_like_it(
    tied_llama: Path, untied_qwen2: Path, tmp_path: Path
) -> None:
    rewrite.write_megatron(HuggingFaceEnd(tied_llama), tmp_path / "megatron", ParallelLayout())
    (tmp_path / "megatron" / "config.json").unlink()
    with pytest.raises(ValueError, match="--like"):
        open_end(tmp_path / "megatron")
    rewrite.compare(MegatronEnd(tmp_path / "megatron", like=tied_llama), HuggingFaceEnd(tied_llama))
    with pytest.raises(ValueError, match=r"does not hold output_layer|expected"):
        MegatronEnd(tmp_path / "megatron", like=untied_qwen2)
    for pair in [("megatron", tied_llama), (tied_llama, "megatron")]:  # of the checkpoint alone
        convert.verify(*(str(tmp_path / path) for path in pair), like=str(tied_llama))
    with pytest.raises(ValueError, match="--like: of a checkpoint of Megatron, but"):
        convert.verify(str(tied_llama), str(tied_llama), like=str(tied_llama))


def test_no_part_has_more_bytes_than_asked_for_but_those_of_one_row(untied_qwen2: Path) -> None:
    end = HuggingFaceEnd(untied_qwen2)
    parts = rewrite.hf_parts(end.model, end.dtype, 1500)
    assert len(parts) > len(rewrite.hf_parts(end.model, end.dtype)) == len(end.model.parameters())
    for name, (start, stop) in parts:
        assert stop - start == 1 or end.rows(name, start, stop).nbytes <= 1500


@pytest.mark.slow
@given(
    model=models(),
    layouts_chosen=st.tuples(layouts(), layouts()),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    part_bytes=st.sampled_from([1500, 1 << 24]),
)
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_model_through_any_two_layouts_in_parts_of_any_size_is_bitwise(
    model: Model,
    layouts_chosen: tuple[ParallelLayout, ParallelLayout],
    dtype: torch.dtype,
    part_bytes: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    first, second = layouts_chosen
    assume(fits(model, first) and fits(model, second))
    folder = tmp_path_factory.mktemp("folders")
    weights = random_weights(model, dtype=dtype)
    end = HuggingFaceEnd(write_folder(folder / "source", model, weights))
    rewrite.write_megatron(end, folder / "one", first, part_bytes=part_bytes)
    rewrite.write_megatron(MegatronEnd(folder / "one"), folder / "other", second, part_bytes=part_bytes)
    rewrite.write_hf(MegatronEnd(folder / "other"), folder / "back", part_bytes=part_bytes)
    back = load_file(folder / "back" / "model.safetensors")
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)
    digests = [json.loads((folder / name / "conversion.json").read_text())["digests"] for name in ("one", "back")]
    assert digests == [tensor_digests(weights)] * 2
