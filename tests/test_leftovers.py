"""What checkpoints leave in their folder that can't be removed: it is named, and costs no other checkpoint."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from test_checkpoints import begin, checkpoints_of, save, saves_of, steps_in


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of folders that can't be removed until they are taken out: on NFS someone has a file of them open."""
    names, rmdir = set[str](), os.rmdir

    def refuse(path: Any, *, dir_fd: int | None = None) -> None:
        if Path(path).name in names:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), path)
        rmdir(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "rmdir", refuse)
    return names


def names_in(run_dir: Path) -> set[str]:
    return {path.name for path in (run_dir / "checkpoints").iterdir()} - {"latest"}


def test_what_can_not_be_removed_is_named_once_and_keeps_no_checkpoint_from_being_saved(
    busy: set[str], tmp_path: Path
) -> None:
    checkpoints, lines, rest = checkpoints_of(tmp_path, keep=1), list[str](), "step_00000001.incomplete"
    busy.add(rest)
    with saves_of(checkpoints, say=lines.append) as saves:
        for step in (1, 2, 3, 4):
            begin(saves, step)
    (line,) = lines
    path = tmp_path / "checkpoints" / rest
    assert line.startswith(f"{path} can't be removed ({path}: Directory not empty)")
    assert names_in(tmp_path) == {"step_00000004", rest} and not list(path.iterdir())
    busy.clear()
    save(checkpoints, 5)
    assert steps_in(tmp_path) == [5]


def test_an_old_checkpoint_that_can_not_even_be_renamed_stays_whole_and_those_after_it_go(
    busy: set[str], tmp_path: Path
) -> None:
    checkpoints, lines = checkpoints_of(tmp_path, keep=1), list[str]()
    save(checkpoints, 1)
    rest = tmp_path / "checkpoints" / "step_00000001.incomplete"
    (rest / "mounted").mkdir(parents=True)
    busy |= {rest.name, "mounted"}
    with saves_of(checkpoints, say=lines.append) as saves:
        for step in (2, 3):
            begin(saves, step)
    assert [line.partition(" can't be removed")[0] for line in lines] == [str(rest), str(rest.with_suffix(""))]
    assert names_in(tmp_path) == {"step_00000001", "step_00000003", rest.name}
    assert len(list(rest.with_suffix("").iterdir())) > 3


def test_a_checkpoint_is_not_written_among_what_an_earlier_run_has_left_of_it(busy: set[str], tmp_path: Path) -> None:
    checkpoints, lines = checkpoints_of(tmp_path), list[str]()
    rest = tmp_path / "checkpoints" / "step_00000002.incomplete"
    rest.mkdir(parents=True)
    busy.add(rest.name)
    with saves_of(checkpoints, say=lines.append) as saves:
        for step in (1, 2, 3):
            begin(saves, step)
    assert names_in(tmp_path) == {"step_00000001", "step_00000003", rest.name}
    assert [line for line in lines if "after 2 steps was not saved" in line and f"{rest} can't be removed" in line]
    assert len(lines) == 2


def test_a_checkpoint_takes_the_place_of_one_that_can_not_be_removed(busy: set[str], tmp_path: Path) -> None:
    checkpoints = checkpoints_of(tmp_path, keep=2)
    for step in (1, 2):
        save(checkpoints, step)
    busy |= {"step_00000002", "mounted"}
    for _ in range(2):
        (tmp_path / "checkpoints" / "step_00000002" / "mounted").mkdir()
        (tmp_path / "checkpoints" / "latest").write_text("step_00000001")  # the run is set back by hand
        save(checkpoints, 2)
    earlier = {f"step_00000002.earlier-{number}.incomplete" for number in (1, 2)}
    assert names_in(tmp_path) == {"step_00000001", "step_00000002", *earlier}
    checkpoints.verify()
    busy.clear()
    save(checkpoints, 3)
    assert steps_in(tmp_path) == [2, 3]
