"""What a conversion refuses, in one message and with nothing left behind; and what its verification finds."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from exports import write_export
from safetensors.torch import load_file
from samples import files_of_at_most
from tiny_models import EXPERTS, cached, config, random_weights, write_folder
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItemType
from torch.serialization import _get_layout
from transfer_process import memory_bytes

from conversion import hf, rewrite, torch_dist
from conversion.checkpoint_index import DistributedCheckpointError
from conversion.ends import MegatronEnd, open_end
from conversion.families import model_from_config
from conversion.folders import ModelFolderError, add_to_record, read_record
from conversion.tiles import ParallelLayout
from conversion.torch_dist import CheckpointReader

ONE = ParallelLayout()


def changed(folder: Path, change: Callable[[dict[str, Tensor]], object], target: Path) -> Path:
    """A copy of an HF folder whose weights `change` has changed."""
    weights = load_file(folder / hf.WEIGHTS)
    change(weights)
    return write_folder(target, EXPERTS, {name: tensor.contiguous() for name, tensor in weights.items()})


def test_weights_that_are_not_finite_are_all_named_and_not_converted(source: Path, tmp_path: Path) -> None:
    def spoil(weights: dict[str, Tensor]) -> None:
        weights["model.layers.1.mlp.experts.3.up_proj.weight"][5, 7] = math.nan
        weights["model.norm.weight"][[2, 9]] = -math.inf

    bad = changed(source, spoil, tmp_path / "bad")
    wanted = r"NaN or Inf in model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight \(1 values\), model\.norm\.weight \(2 v"
    for write in (
        lambda: rewrite.write_hf(open_end(bad), tmp_path / "out"),
        lambda: rewrite.write_megatron(open_end(bad), tmp_path / "out", ParallelLayout(tensor=2)),
    ):
        with pytest.raises(ModelFolderError, match=wanted):
            write()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "source"]
    assert rewrite.read_through(open_end(bad)).bad.total() == 3
    rewrite.compare(open_end(bad), open_end(bad))  # the same weights, NaN or not


def test_a_disk_that_fills_up_leaves_nothing(source: Path, megatron: Path, tmp_path: Path) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    with files_of_at_most(100_000):
        with pytest.raises(OSError, match=r"can't write .*distcp: File too large"):
            rewrite.write_megatron(open_end(source), tmp_path / "out", ONE)
        with pytest.raises(OSError, match="no room for the"):
            rewrite.write_hf(open_end(megatron), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_record_that_a_full_disk_refuses_stays_as_it_was(source: Path) -> None:
    added = add_to_record(source, {"a": 1, "b": 2})
    assert add_to_record(source, {"b": 3}) == added | {"b": 3} == read_record(source)
    before = sorted(path.name for path in source.iterdir())
    with files_of_at_most(1000), pytest.raises(OSError, match=r"can't write .*conversion\.json: File too large"):
        add_to_record(source, {"c": "long" * 1000})
    assert read_record(source) == added | {"b": 3}
    assert sorted(path.name for path in source.iterdir()) == before


def test_a_tokenizer_that_can_t_be_copied_is_told_before_the_weights_are_written(source: Path, tmp_path: Path) -> None:
    (source / "vocab.txt").write_bytes(bytes(100_000))
    end = open_end(source)
    for write in (rewrite.write_hf, lambda end, to: rewrite.write_megatron(end, to, ONE)):
        with files_of_at_most(80_000), pytest.raises(OSError, match=r"can't write .*out.*vocab\.txt: File too large"):
            write(end, tmp_path / "out")
    room = rewrite.preview(end, ONE).written_bytes, rewrite.preview(end, None).written_bytes
    (source / "vocab.txt").write_bytes(b"")
    assert (rewrite.preview(end, ONE).written_bytes, rewrite.preview(end, None).written_bytes) == (
        room[0] - 100_000,
        room[1] - 100_000,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_too_small_a_disk_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    room = os.statvfs(tmp_path)
    large = model_from_config(config(vocab_size=room.f_blocks * room.f_frsize // 48))
    (tmp_path / "config.json").write_text(json.dumps(large.config))
    end = open_end(tmp_path, plan_only=True)
    with pytest.raises(OSError, match=r"no room for the [\d,]+ bytes of .*out: [\d,]+ are free"):
        rewrite.write_megatron(end, tmp_path.parent / "out", ONE)


@pytest.mark.parametrize("layout", [ONE, ParallelLayout(tensor=2, expert=2, data=2)])
def test_the_disk_that_a_preview_asks_for_is_enough(layout: ParallelLayout, source: Path, tmp_path: Path) -> None:
    """Of small experts archives and index are as large as the numbers."""
    end = open_end(source)
    rewrite.write_megatron(end, tmp_path / "out", layout)
    used = sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    assert used <= rewrite.preview(end, layout).written_bytes < 2 * used


def test_a_destination_that_is_or_holds_the_source_is_refused(source: Path, tmp_path: Path) -> None:
    for place, words in (
        (source, "is the source itself|is no export"),
        (source / "inside", "lies in the other"),
        (tmp_path, "lies in the other|is no export"),
    ):
        with pytest.raises(ModelFolderError, match=words):
            rewrite.write_hf(open_end(source), place)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_links_are_followed_at_both_ends(source: Path, tmp_path: Path) -> None:
    """The Hugging Face cache keeps files as links; a destination may be a link to another disk."""
    (tmp_path / "link").symlink_to(cached(source, tmp_path))
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    for _ in range(2):  # the second replaces the first, not the link
        rewrite.write_megatron(open_end(tmp_path / "link"), tmp_path / "out", ONE)
        assert (tmp_path / "out").is_symlink()
    rewrite.compare(open_end(tmp_path / "disk"), open_end(source))
    (tmp_path / "again").symlink_to(source)
    with pytest.raises(ModelFolderError, match="is the source itself"):
        rewrite.write_hf(open_end(source), tmp_path / "again")


def test_several_types_and_pickles_are_refused(source: Path, tmp_path: Path) -> None:
    mixed = changed(source, lambda w: w.update({"lm_head.weight": w["lm_head.weight"].half()}), tmp_path / "mixed")
    with pytest.raises(ModelFolderError, match=r"mixes types: float16 \(lm_head\.weight\), float32"):
        open_end(mixed)
    (source / hf.WEIGHTS).rename(source / "model.pt")
    with pytest.raises(ModelFolderError, match=r"model\.pt is a pickle checkpoint"):
        open_end(source, plan_only=True)


def test_a_buffer_of_another_type_is_no_mix(source: Path, tmp_path: Path) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8, dtype=torch.float16)}
    old = changed(source, lambda w: w.update(extra), tmp_path / "old")
    rewrite.compare(open_end(old), open_end(source))


def in_the_index(code: bytes) -> bytes:
    """A pickle that runs `code`, and is an index of nothing."""
    whole = b"ctorch.distributed.checkpoint.metadata\nMetadata\n)\x81}("
    return b"\x80\x02" + code + whole + b"X\x13\0\0\0state_dict_metadata}X\x0c\0\0\0storage_data}ub."


BYTE_IO = b"ctorch.distributed.checkpoint.planner\nWriteItemType\nK\3\x85R"


@pytest.mark.parametrize(
    ("thing", "name", "value"),
    [
        (b"cpathlib\nPosixPath\n", b"exists", b"cpathlib\nPosixPath\n"),  # then a path is there, whatever it is
        (b"ctorch.distributed.checkpoint.metadata\nMetadataIndex\n", b"__eq__", b"N"),
        (b"ctorch.distributed.checkpoint.metadata\nMetadataIndex\n", b"__qualname__", b"X\1\0\0\0x"),
        (b"ctorch.serialization\n_get_layout\n", b"__defaults__", b"N\x85"),
        (b"ctorch.serialization\n_get_layout\n", b"__module__", b"X\1\0\0\0x"),
        (BYTE_IO, b"__class__", b"ctorch.distributed.checkpoint.metadata\nStorageMeta\n"),
        (BYTE_IO, b"_value_", b"K\1"),
    ],
)
def test_an_index_changes_nothing_that_it_names(thing: bytes, name: bytes, value: bytes, megatron: Path) -> None:
    index, there = megatron / ".metadata", MetadataIndex("x", [0])
    index.write_bytes(in_the_index(b""))
    assert CheckpointReader(megatron).shapes() == {}
    size = len(name).to_bytes(4, "little")
    index.write_bytes(in_the_index(thing + b"N}X" + size + name + value + b"s\x86b0"))
    with pytest.raises(DistributedCheckpointError, match="it changes "):
        CheckpointReader(megatron)
    assert not Path("/no/such/file").exists() and there == MetadataIndex("x", [0])
    assert MetadataIndex.__qualname__ == "MetadataIndex" and _get_layout.__defaults__ is None
    assert _get_layout.__module__ == "torch.serialization"
    assert [(type(kind), kind.value) for kind in WriteItemType] == [(WriteItemType, number) for number in (1, 2, 3)]


def test_a_damaged_index_is_refused(megatron: Path) -> None:
    index = megatron / ".metadata"
    data = index.read_bytes()
    for size in range(0, len(data), len(data) // 40):
        index.write_bytes(data[:size])
        with pytest.raises(DistributedCheckpointError, match=r"\.metadata is damaged"):
            open_end(megatron)
    index.write_bytes(data.replace(b"__0_0.distcp", b"../../etc/pw"))
    with pytest.raises(DistributedCheckpointError, match=r"\.metadata names '\.\./\.\./etc/pw'"):
        open_end(megatron)


def swap_gate_and_up(weights: dict[str, Tensor]) -> None:
    gate, up = (f"model.layers.0.mlp.experts.0.{part}_proj.weight" for part in ("gate", "up"))
    weights[gate], weights[up] = weights[up], weights[gate]


def flip_a_bit(weights: dict[str, Tensor]) -> None:
    weights["model.layers.2.mlp.experts.4.down_proj.weight"].view(torch.int32)[7, 3] ^= 1


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (flip_a_bit, r"^model\.layers\.2\.mlp\.experts\.4\.down_proj\.weight, row 7, column 3: .* 1 of"),
        (swap_gate_and_up, r"^model\.layers\.0\.mlp\.experts\.0\.gate_proj\.weight, row 0"),
    ],
)
def test_verify_finds_every_fault_by_name(
    spoil: Callable[[dict[str, Tensor]], None], named: str, source: Path, megatron: Path, tmp_path: Path
) -> None:
    bad = changed(source, spoil, tmp_path / "bad")
    for left, right in ((megatron, bad), (bad, source)):
        with pytest.raises(rewrite.MismatchError, match=named):
            rewrite.compare(open_end(left), open_end(right))


def test_verify_compares_types_as_numbers_and_says_when_only_rounding_differs(
    source: Path, megatron: Path, tmp_path: Path
) -> None:
    weights = load_file(source / hf.WEIGHTS)
    halves = {name: tensor.bfloat16() for name, tensor in weights.items()}
    halves["model.norm.weight"][3] = math.nan
    write_export(tmp_path / "bf16", halves, source, max_shard_bytes=30_000)
    write_export(tmp_path / "fp32", {name: tensor.float() for name, tensor in halves.items()}, source)
    rewrite.compare(open_end(tmp_path / "bf16"), open_end(tmp_path / "fp32"))
    with pytest.raises(rewrite.MismatchError, match=r"embed_tokens\.weight, row 0, .* equal once rounded to bfloat16$"):
        rewrite.compare(open_end(tmp_path / "bf16"), open_end(megatron))


def test_unstacked_layers_and_the_other_norm_s_name_are_read(source: Path, tmp_path: Path) -> None:
    """Megatron writes layers one by one where they differ, and its local layers call a router's norm otherwise."""
    end = open_end(source)
    rewrite.write_megatron(end, tmp_path / "stacked", ONE)
    reader = CheckpointReader(tmp_path / "stacked")
    norm, other = "decoder.layers.pre_mlp_layernorm.weight", "decoder.layers.mlp.linear_fc1.layer_norm_weight"
    for unstacked in (False, True):
        parts, origin = {}, {}
        for name, cut in rewrite.chunks(EXPERTS, ONE, torch.float32).items():
            for index in cut:
                new = other if name == norm else name
                if unstacked and ".layers." in name:
                    new, place = new.replace(".layers.", f".layers.{index[0][0]}."), index[1:]
                else:
                    place = index
                parts.setdefault(new, []).append(place)
                origin[new, place] = (name, index)

        def read(name: str, place: torch_dist.Index, origin: dict = origin) -> Tensor:
            return reader.read(*origin[name, place]).reshape([b - a for a, b in place]).clone()

        folder = tmp_path / f"unstacked-{unstacked}"
        folder.mkdir()
        torch_dist.write(folder, parts, read, torch.float32, {})
        rewrite.compare(MegatronEnd(folder, like=source), end)


@pytest.mark.parametrize(
    ("more", "less", "named"),
    [
        (config("qwen2"), config(), r"holds decoder\.layers\.self_attention\.linear_qkv\.bias, which the model of"),
        (config("qwen3"), config(head_dim=16), r"holds decoder\..*\.[qk]_layernorm\.weight, which the model of"),
        (config(num_hidden_layers=5), config(), r"is \(5, .*, more layers or experts than the \(2,\) of the model of"),
        (config(vocab_size=131 + 256), config(), r"has 388 rows, more than .* 131 of .* \(to a multiple of 256\)"),
    ],
    ids=["biases", "norms of heads", "layers", "tokens"],
)
def test_a_checkpoint_that_holds_more_than_the_model_is_no_checkpoint_of_it(
    more: dict[str, object], less: dict[str, object], named: str, tmp_path: Path
) -> None:
    """The rest would be lost, and verify would call what is left the same."""
    model = model_from_config(more)
    source = write_folder(tmp_path / "source", model, random_weights(model))
    rewrite.write_megatron(open_end(source), tmp_path / "megatron", ParallelLayout(tensor=2))
    for name in ("config.json", "conversion.json"):
        (tmp_path / "megatron" / name).unlink()
    assert MegatronEnd(tmp_path / "megatron", like=source).model == model
    (source / "config.json").write_text(json.dumps(less))
    with pytest.raises(ValueError, match=f"{named}.*: take both from the same model"):
        MegatronEnd(tmp_path / "megatron", like=source)


def test_parts_that_are_cut_for_their_size_are_no_ranks(tmp_path: Path) -> None:
    model = model_from_config(config(vocab_size=600))
    source = write_folder(tmp_path / "source", model, random_weights(model))
    parts_of_250_rows = 250 * 48 * 4
    for tensor in (1, 2):
        megatron = tmp_path / f"tensor-{tensor}"
        rewrite.write_megatron(open_end(source), megatron, ParallelLayout(tensor=tensor), part_bytes=parts_of_250_rows)
        (megatron / "config.json").write_text(json.dumps(model.config | {"vocab_size": 400}))
    with pytest.raises(ValueError, match=r"has 600 rows, more than .* 400 of .* \(to a multiple of 128\)"):
        open_end(tmp_path / "tensor-1")
    assert open_end(tmp_path / "tensor-2").notes()["vocabulary"] == "padded to 600"  # to a multiple of 256


def test_a_vocabulary_padded_as_megatron_lm_does_is_one(tmp_path: Path) -> None:
    model = model_from_config(config())
    source = write_folder(tmp_path / "source", model, random_weights(model))
    padded = ParallelLayout(tensor=2, vocabulary_multiple=128)
    rewrite.write_megatron(open_end(source), tmp_path / "megatron", padded)
    assert open_end(tmp_path / "megatron").notes()["vocabulary"] == "padded to 256"
    rewrite.compare(open_end(tmp_path / "megatron"), open_end(source))


def write_repeated(folder: Path, like: Path) -> None:
    """A folder of random numbers, the same in each tensor but for where they begin: any number of bytes in no time."""
    block = torch.randn(1_000_003, generator=torch.Generator().manual_seed(8)).to(torch.bfloat16)
    with hf.writing(folder, like, torch.bfloat16) as export:
        for number, tensor in enumerate(export.tensors.values()):
            for part in tensor.view(-1).split(len(block)):
                part.copy_(block.roll(number)[: len(part)])


def test_a_conversion_holds_a_few_parts_and_not_the_model(tmp_path: Path) -> None:
    """610 MB, 410 of them one embedding, through at most 5 parts a thread."""
    sizes = {"vocab_size": 200_000, "hidden_size": 1024, "intermediate_size": 16384, "tie_word_embeddings": True}
    model = model_from_config(config("llama", **sizes))
    (tmp_path / "config.json").write_text(json.dumps(model.config))
    write_repeated(tmp_path / "source", tmp_path)
    size = model.num_parameters() * 2
    for write, source, target in (
        (lambda end, to: rewrite.write_megatron(end, to, ONE), "source", "megatron"),
        (rewrite.write_hf, "megatron", "hf"),
    ):
        end = open_end(tmp_path / source)
        allowed = rewrite.preview(end, ONE).peak_bytes
        Path("/proc/self/clear_refs").write_text("5")  # the peak is from here on
        before = memory_bytes("VmHWM")
        write(end, tmp_path / target)
        assert memory_bytes("VmHWM") - before < allowed < 0.6 * size
    texts = [(tmp_path / name / "conversion.json").read_text() for name in ("source", "megatron", "hf")]
    digests = [json.loads(text)["digests"] for text in texts]
    assert digests[0] == digests[1] == digests[2]
    assert len(set(map(str, digests[0].values()))) == len(model.parameters())
