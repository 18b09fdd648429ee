"""Distributed checkpoints that conversion/ writes are loaded by Megatron itself, and the reverse (real ranks)."""

import contextlib
import dataclasses
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint_ranks
import pytest
import ranks as work
import torch
from ranks import Job
from samples import Trap
from test_layouts import batch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from astar_megatron.model.compute_type import ComputeType
from conversion import rewrite
from conversion.ends import HuggingFaceEnd, MegatronEnd, open_end
from conversion.tiles import ParallelLayout


@pytest.mark.parametrize("kind", ["tied_llama", "untied_qwen2"])
@pytest.mark.parametrize(("cut", "tensor", "pipeline"), [(1, 1, 1), (1, 2, 2), (2, 1, 3), (2, 2, 1)])
def test_megatron_loads_what_was_written(
    kind: str, cut: int, tensor: int, pipeline: int, ranks: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(kind)
    rewrite.write_megatron(HuggingFaceEnd(source), tmp_path / "megatron", ParallelLayout(tensor=cut))
    job = Job(str(source), tensor=tensor, pipeline=pipeline)
    wrong = ranks.run(work.loaded_by_megatron, job.world_size, job=job, folder=str(tmp_path / "megatron"))
    assert wrong == [[]] * job.world_size


@pytest.mark.parametrize("kind", ["tied_llama", "untied_qwen2"])
def test_a_checkpoint_of_training_converts_to_what_training_exports(
    kind: str, ranks: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(kind)
    job = Job(str(source), tensor=2, pipeline=3)
    checkpoint, folder = tmp_path / "step_00000001", tmp_path / "hf"
    ranks.run(
        work.exported,
        job.world_size,
        job=job,
        batches=[batch(3)],
        save=str(checkpoint),
        folder=str(folder),
        shared=str(tmp_path),
    )
    end = open_end(checkpoint)
    assert isinstance(end, MegatronEnd)
    rewrite.write_hf(end, tmp_path / "converted")
    rewrite.compare(HuggingFaceEnd(tmp_path / "converted"), HuggingFaceEnd(folder))
    with pytest.raises(rewrite.MismatchError):
        rewrite.compare(end, HuggingFaceEnd(source))  # the step did change the weights


@pytest.mark.parametrize(
    "layout",
    [
        ParallelLayout(),
        ParallelLayout(expert=2, data=2),
        ParallelLayout(tensor=2, expert=2, data=2),
        ParallelLayout(pipeline=2),
    ],
    ids=["one", "ep2", "tp2-ep2", "pp2"],
)
def test_experts_go_to_megatron_and_come_back(
    layout: ParallelLayout, ranks: Any, tmp_path: Path, tiny_family: Callable[..., Path]
) -> None:
    source, ours, megatrons = tiny_family("qwen3_moe"), tmp_path / "ours", tmp_path / "megatrons"
    rewrite.write_megatron(HuggingFaceEnd(source), ours, ParallelLayout(tensor=2, expert=2, data=2))
    arguments = {"source": str(source), "layout": layout}
    wrong = ranks.run(checkpoint_ranks.loaded_strictly, layout.world_size, folder=str(ours), **arguments)
    assert wrong == [[]] * layout.world_size
    megatrons.mkdir()
    ranks.run(checkpoint_ranks.saved, layout.world_size, folder=str(megatrons), **arguments)
    rewrite.compare(MegatronEnd(megatrons, like=source), HuggingFaceEnd(source))


@pytest.mark.parametrize(
    ("kind", "dtype", "layout"),
    [
        ("untied_qwen2", "float32", {"data": 2, "context": 2}),
        pytest.param("untied_qwen2", "bfloat16", {"data": 2, "tensor": 2}, marks=pytest.mark.slow),
        ("tied_llama", "float32", {"tensor": 2}),
        ("experts", "bfloat16", {"data": 2, "expert": 2}),
        pytest.param("experts", "float32", {"data": 2, "pipeline": 2}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("writer", ["ours", "Megatron"])
def test_each_reads_the_state_of_the_optimizer_that_the_other_wrote(
    writer: str,
    kind: str,
    dtype: ComputeType,
    layout: dict[str, Any],
    ranks: Any,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    tiny_family: Callable[..., Path],
) -> None:
    """What a rank holds ends in the middle of parameters and rows. A tied head by itself Megatron reads wrongly."""
    source = tiny_family("qwen3_moe") if kind == "experts" else request.getfixturevalue(kind)
    job = Job(str(source), dtype=dtype, **layout)
    arguments = {"batch": batch(3), "folder": str(tmp_path / "state"), "writer": writer}
    assert ranks.run(checkpoint_ranks.optimizer_states, job.world_size, job=job, **arguments) == [0] * job.world_size


def test_an_export_that_lost_a_row_is_named_on_every_rank(ranks: Any, tied_llama: Path) -> None:
    arguments = {"source": str(tied_llama), "layout": ParallelLayout(tensor=2)}
    for name, row in (("model.layers.4.mlp.down_proj.weight", 31), ("model.norm.weight", 5)):
        answers = ranks.run(checkpoint_ranks.damaged_export, 2, fault=(name, row), **arguments)
        assert answers == [f"{name}, row {row}"] * 2
    sound = ranks.run(checkpoint_ranks.damaged_export, 2, fault=None, **arguments)
    assert sound == [f"{len(HuggingFaceEnd(tied_llama).model.parameters())} digests", "0 digests"]


def plant_in_the_index(folder: Path, mark: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Trap(mark)))


def plant_in_an_object(folder: Path, mark: Path) -> None:
    torch.save([Trap(mark)], folder / "__9_0.distcp")
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for key, place in metadata.storage_data.items():
        if isinstance(metadata.state_dict_metadata[key.fqn], BytesStorageMetadata):
            size = (folder / "__9_0.distcp").stat().st_size
            changes = {"relative_path": "__9_0.distcp", "offset": 0, "length": size}
            metadata.storage_data[key] = dataclasses.replace(place, **changes)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def plant_in_another_index(folder: Path, mark: Path) -> None:
    """Which torch reads where it does not like the whole one."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    trapped = dataclasses.replace(metadata, planner_data=Trap(mark))
    (folder / "__0.metadata").write_bytes(pickle.dumps(trapped))
    metadata.storage_meta = 5
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def test_an_index_beside_that_of_a_checkpoint_is_not_read(ranks: Any, tied_llama: Path, tmp_path: Path) -> None:
    job, folder, mark = Job(str(tied_llama)), tmp_path / "step_00000001", tmp_path / "ran"
    ranks.run(work.steps, 1, job=job, batches=[batch(3)], load=None, save=str(folder))
    plant_in_another_index(folder, mark)
    ranks.run(work.steps, 1, job=job, batches=[batch(4)], load=str(folder), save=None)
    assert not mark.exists()
    with contextlib.suppress(AssertionError):
        ranks.run(work.loaded_by_megatron, 1, job=job, folder=str(folder))
    assert mark.exists()


def test_no_code_in_a_checkpoint_runs_when_training_continues_from_it(
    ranks: Any, tied_llama: Path, tmp_path: Path
) -> None:
    """The traps work: Megatron's own load runs them."""
    job, sound = Job(str(tied_llama)), tmp_path / "step_00000001"
    ranks.run(work.steps, 1, job=job, batches=[batch(3)], load=None, save=str(sound))
    for plant, words in (
        (plant_in_the_index, r"it names \w+\.mkdir, which no index of a checkpoint needs"),
        (plant_in_an_object, r"Weights only load failed"),
    ):
        folder, mark = tmp_path / plant.__name__, tmp_path / f"{plant.__name__}.ran"
        shutil.copytree(sound, folder)
        plant(folder, mark)
        with pytest.raises(AssertionError) as caught:
            ranks.run(work.steps, 1, job=job, batches=[batch(4)], load=str(folder), save=None)
        text = str(caught.value)  # the error that a user sees, with those behind it
        assert f"ValueError: {folder}: can't be read, " in text and re.search(words, text), text
        assert not mark.exists()
        with pytest.raises(AssertionError):
            ranks.run(work.loaded_by_megatron, 1, job=job, folder=str(folder))
        assert mark.exists()
