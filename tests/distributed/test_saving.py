"""A checkpoint is of the step that it names, however late it is written; without room nothing else changes."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import saving_ranks as work
from ranks import Job
from samples import run_config
from test_layouts import batch

from astar_megatron.model.compute_type import ComputeType
from astar_megatron.run.resources import checkpoint_bytes
from conversion.families import read_model

DISK_BYTES = 24 << 20  # the model's checkpoint takes 17 MB


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs root and the right to mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(
    ("dtype", "axes"),
    [
        ("float32", {}),
        ("bfloat16", {"data": 2}),
        ("float32", {"tensor": 2}),
        pytest.param("bfloat16", {}, marks=pytest.mark.slow),
        pytest.param("float32", {"data": 2}, marks=pytest.mark.slow),
        pytest.param("bfloat16", {"tensor": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_that_is_written_while_training_goes_on_is_of_the_step_it_names(
    axes: dict[str, Any], dtype: ComputeType, ranks: Any, untied_qwen2: Path, tmp_path: Path
) -> None:
    job = Job(str(untied_qwen2), dtype=dtype, **axes)
    batches, folder = [batch(seed, version=seed) for seed in range(3)], str(tmp_path / "saved")
    answers = ranks.run(work.written_late, job.world_size, job=job, batches=batches, folder=folder, fill="")
    for digests, problem in answers:
        assert not problem and len(set(digests)) == 3
    assert ranks.run(work.loaded, job.world_size, job=job, folder=folder) == [digests[0] for digests, _ in answers]
    cfg = run_config(objective={"name": "oapl"}, oapl={"refresh_steps": 5})  # the reference is a copy there too
    forecast = checkpoint_bytes(cfg, read_model(untied_qwen2).num_parameters(), dtype)
    assert 1 < sum(file.stat().st_size for file in Path(folder).iterdir()) / forecast < 1.1


def test_a_disk_that_fills_up_during_a_write_is_named_and_costs_no_state(
    ranks: Any, untied_qwen2: Path, small_disk: Path, tmp_path: Path
) -> None:
    job, batches = Job(str(untied_qwen2), tensor=2), [batch(seed, version=seed) for seed in range(3)]
    arguments = {"job": job, "batches": batches}
    full = ranks.run(
        work.written_late, 2, folder=str(small_disk / "saved"), fill=str(small_disk / "filling"), **arguments
    )
    wide = ranks.run(work.written_late, 2, folder=str(tmp_path / "saved"), fill="", **arguments)
    for (digests, problem), (wanted, _) in zip(full, wide, strict=True):
        assert digests == wanted
        assert problem.startswith(f"{small_disk}/saved: can't be written: No space left on device; free some space")


def test_a_disk_without_room_is_seen_on_all_ranks_before_it_is_filled(
    ranks: Any, untied_qwen2: Path, small_disk: Path
) -> None:
    (small_disk / "other").write_bytes(bytes(DISK_BYTES - (64 << 10)))
    folder = small_disk / "saved"
    answers = ranks.run(
        work.without_room, 2, job=Job(str(untied_qwen2), data=2), batch=batch(1), folder=str(folder), limit_bytes=None
    )
    for problem, before, after in answers:
        assert problem.startswith(f"StorageError: {folder}: ") and "bytes are to be written" in problem
        assert before == after
    assert list(folder.iterdir()) == []


def test_a_write_that_is_cut_is_named(ranks: Any, untied_qwen2: Path, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    ((problem, before, after),) = ranks.run(
        work.without_room, 1, job=Job(str(untied_qwen2)), batch=batch(1), folder=str(folder), limit_bytes=50_000
    )
    assert problem.startswith(f"{folder}: can't be written: File too large; free some space") and before == after


def test_where_one_rank_cannot_read_its_part_all_refuse(ranks: Any, untied_qwen2: Path, tmp_path: Path) -> None:
    job, folder = Job(str(untied_qwen2), data=2), tmp_path / "saved"
    arguments = {"job": job, "folder": str(folder)}
    ranks.run(work.written_late, 2, batches=[batch(0)], fill="", **arguments)
    assert ranks.run(work.refused, 2, **arguments) == ["", ""]
    for name in ("__0_0.distcp", "__1_0.distcp"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
        first, second = ranks.run(work.refused, 2, **arguments)
        assert first == second and first.startswith(f"{folder}: can't be read, a file of it is damaged or missing (")
        (folder / name).write_bytes(whole)


def test_a_rank_that_has_no_part_of_the_optimizers_state_loads(ranks: Any, untied_qwen2: Path, tmp_path: Path) -> None:
    job, folder = Job(str(untied_qwen2), data=2), str(tmp_path / "saved")
    ((digests, _), _) = ranks.run(work.written_late, 2, job=job, batches=[batch(0)], folder=folder, fill="")
    digest, _ = ranks.run(work.loaded_without_a_piece, 2, job=job, folder=folder)
    assert digest == digests[0]


def test_a_class_in_an_optimizers_groups_is_not_written(ranks: Any, untied_qwen2: Path, tmp_path: Path) -> None:
    """Megatron's optimizer of `optim.offload` has some; a load, which runs no code, refuses them."""
    job, folder = Job(str(untied_qwen2), data=2), str(tmp_path / "saved")
    digests = ranks.run(work.saved_with_a_class, 2, job=job, batch=batch(0), folder=folder)
    assert ranks.run(work.loaded, 2, job=job, folder=folder) == digests
