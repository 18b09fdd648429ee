"""Distributed checkpoints that conversion/ writes are loaded by Megatron itself, and the reverse (real ranks)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint_ranks
import pytest
import ranks as work
from ranks import Job
from test_layouts import batch

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


def test_an_export_that_lost_a_row_is_named_on_every_rank(ranks: Any, tied_llama: Path) -> None:
    arguments = {"source": str(tied_llama), "layout": ParallelLayout(tensor=2)}
    for name, row in (("model.layers.4.mlp.down_proj.weight", 31), ("model.norm.weight", 5)):
        answers = ranks.run(checkpoint_ranks.damaged_export, 2, fault=(name, row), **arguments)
        assert answers == [f"{name}, row {row}"] * 2
    sound = ranks.run(checkpoint_ranks.damaged_export, 2, fault=None, **arguments)
    assert sound == [f"{len(HuggingFaceEnd(tied_llama).model.parameters())} digests", "0 digests"]
