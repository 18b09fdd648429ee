"""Dithered masters on real ranks in bfloat16: the same in every layout, drawn once, and what they change."""

import dataclasses
from pathlib import Path
from typing import Any

import dither_ranks
import pytest
import torch
import training as work
from ranks import Job
from safetensors.torch import load_file
from samples import logratio_max
from test_layouts import batch
from training import Run, Trained

from astar_megatron.config import ParallelConfig
from astar_megatron.model.compute_type import ComputeType

LAYOUTS = [
    ("tied_llama", {"tensor": 2, "pipeline": 2, "data": 2}),
    ("qwen3_moe", {"tensor": 2, "data": 2, "expert": 2}),
    pytest.param("untied_qwen2", {"tensor": 2, "context": 2, "pipeline": 3}, marks=pytest.mark.slow),
    pytest.param("untied_qwen2", {"pipeline": 2, "virtual": 3, "data": 2}, marks=pytest.mark.slow),
    pytest.param("tied_llama", {"data": 4, "pipeline": 2}, marks=pytest.mark.slow),
]


def whole_masters(ranks: Any, job: Job, tmp_path: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the masters of all ranks as HF tensors, copies proven equal, and the exported weights."""
    folder = tmp_path / f"export_of_{job.world_size}"
    shards = ranks.run(dither_ranks.masters, job.world_size, job=job, folder=str(folder), shared=str(tmp_path))
    weights = load_file(folder / "model.safetensors")
    masters = {name: torch.full(weight.shape, float("nan")) for name, weight in weights.items()}
    for hf, rows, cols, array in (tile for of_rank in shards for tile in of_rank):
        values = torch.from_numpy(array)
        part = masters[hf][slice(*rows)] if cols is None else masters[hf][slice(*rows), slice(*cols)]
        assert bool(((part == values) | part.isnan() | values.isnan()).all()), f"two copies of {hf} differ"
        part.copy_(torch.where(values.isnan(), part, values))
    return masters, weights


@pytest.mark.parametrize(("kind", "axes"), LAYOUTS, ids=str)
def test_every_layout_has_the_masters_of_one_rank(
    kind: str, axes: dict[str, Any], ranks: Any, request: pytest.FixtureRequest, tmp_path: Path, tiny_family: Any
) -> None:
    path = tiny_family(kind) if kind == "qwen3_moe" else request.getfixturevalue(kind)
    wanted, weights = whole_masters(ranks, Job(str(path), dtype="bfloat16"), tmp_path)
    masters, same = whole_masters(ranks, Job(str(path), dtype="bfloat16", **axes), tmp_path)
    for name, weight in weights.items():
        assert torch.equal(masters[name], wanted[name]), name
        assert torch.equal(same[name], weight), name
        assert torch.equal(wanted[name].bfloat16(), weight), name  # the export holds the compute weights
        assert (wanted[name] != weight.float())[weight != 0].float().mean() > 0.9, name


@pytest.mark.parametrize(("dtype", "dither"), [("bfloat16", False), ("float32", True)])
def test_masters_are_the_weights_without_dither_and_in_float32(
    dtype: ComputeType, dither: bool, ranks: Any, tied_llama: Path, tmp_path: Path
) -> None:
    masters, weights = whole_masters(ranks, Job(str(tied_llama), dtype=dtype, dither=dither), tmp_path)
    for name, weight in weights.items():
        assert torch.equal(masters[name], weight.float()), name


def train(ranks: Any, run: Run) -> list[Trained]:
    return ranks.run(work.trained, ParallelConfig(**run.axes).world_size, run=run)


@pytest.mark.parametrize(
    ("axes", "dither"),
    [
        ({"tensor": 2, "data": 2}, True),
        ({}, False),
        pytest.param({"pipeline": 2, "data": 2}, True, marks=pytest.mark.slow),
        pytest.param({"tensor": 2, "data": 2}, False, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_masters_of_a_checkpoint_are_never_drawn_again(
    axes: dict[str, int], dither: bool, ranks: Any, tied_llama: Path, tmp_path: Path
) -> None:
    """Continued with the other setting, a run is the uninterrupted one: what the checkpoint holds counts."""
    batches = [batch(version, version=version) for version in range(3)]
    whole = Run(str(tied_llama), batches, dtype="bfloat16", axes=axes, optim={"dither": dither})
    wanted = train(ranks, whole)
    save = str(tmp_path / "step_00000002")
    train(ranks, dataclasses.replace(whole, batches=batches[:2], save=save))
    rest = dataclasses.replace(whole, batches=batches[2:], load=save, optim={"dither": not dither})
    for rank, other in zip(train(ranks, rest), wanted, strict=True):
        assert rank.digests == other.digests[2:]


def test_step_0_is_exact_and_from_then_on_more_weights_change_than_without(ranks: Any, tied_llama: Path) -> None:
    batches = [batch(version, version=version) for version in range(2)]
    run = Run(str(tied_llama), batches, dtype="bfloat16", optim={"lr": 1e-5, "weight_decay": 0.0})
    ((dithered,), (without,)) = (
        train(ranks, dataclasses.replace(run, optim=run.optim | {"dither": dither})) for dither in (True, False)
    )
    assert "master weights dithered" in dithered.reason
    assert "dithered" not in without.reason
    for trained in (dithered, without):
        assert logratio_max(trained.stats[0]) == trained.stats[0].changed_weights == 0.0
    # One step of 1e-5 is 1.8 % of the grid's step at a weight of 0.15, the models' rms.
    assert 0.01 < dithered.stats[1].changed_weights < 0.1
    assert without.stats[1].changed_weights < 0.7 * dithered.stats[1].changed_weights
