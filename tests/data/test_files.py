"""Files that are whole or absent, and the data that the project makes itself."""

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
from samples import files_of_at_most, read_jsonl

from astar_megatron.algorithm import rewards
from astar_megatron.data.arithmetic import one_digit_additions, write_jsonl
from astar_megatron.data.files import StorageError, exclusive, write_atomic, write_figure


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    for data in (b"older", b"old"):
        write_atomic(tmp_path / "file", data)
    words = r"file: can't write 100 bytes: .*free some space"
    with files_of_at_most(10), pytest.raises(StorageError, match=words):
        write_atomic(tmp_path / "file", b"x" * 100)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"old")]


def test_a_folder_that_refuses_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"none/file: can't write 1 bytes: No such file") as caught:
        write_atomic(tmp_path / "none" / "file", b"x")
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, OSError)
    with pytest.raises(StorageError):
        write_atomic("/proc/astar", b"x")


@pytest.mark.parametrize("replace", [True, False])
def test_a_link_stays_and_what_it_names_is_written(replace: bool, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "elsewhere" / "file")
    write_atomic(link, b"x", replace=replace)
    assert link.is_symlink() and (tmp_path / "elsewhere" / "file").read_bytes() == b"x"


class HalfDrawn:
    """A figure that fails after its first bytes."""

    def savefig(self, file: io.BytesIO | Path, **_: str) -> None:
        with file.open("wb") if isinstance(file, Path) else file as opened:
            opened.write(b"half")
            raise MemoryError


def test_a_plot_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    (picture := tmp_path / "x.png").write_bytes(b"old")
    with pytest.raises(MemoryError):
        write_figure(picture, HalfDrawn())
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x.png", b"old")]


def test_the_one_digit_additions_are_all_64_and_right() -> None:
    rows = one_digit_additions()
    assert len({row["question"] for row in rows}) == 64
    for row in rows:
        numbers = re.fullmatch(r"What is (\d) \+ (\d)\? Answer with just the number\.", row["question"])
        assert numbers is not None
        assert int(numbers[1]) + int(numbers[2]) == int(row["answer"])
        assert rewards.get("last_number")(f"It is {row['answer']}.", row["answer"]) == 1


def test_rows_are_written_one_a_line(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "new" / "data.jsonl", [{"question": "é?", "answer": "1"}, {"question": "b"}])
    assert read_jsonl(tmp_path / "new" / "data.jsonl") == [{"question": "é?", "answer": "1"}, {"question": "b"}]


def test_a_file_system_without_locks_is_named_with_a_remedy(tmp_path: Path) -> None:
    """As Lustre without -o flock: flock(2) is not there."""
    program = f"""
import fcntl, pathlib, sys, types

def flock(file, how):
    raise OSError(38, "Function not implemented")

sys.modules["fcntl"] = types.SimpleNamespace(**vars(fcntl) | {{"flock": flock}})
from astar_megatron.data.files import StorageError, exclusive
try:
    with exclusive(pathlib.Path({str(tmp_path / "run.lock")!r}), "another run"):
        pass
except StorageError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    words = "run.lock: can't lock it: Function not implemented; have its file system mounted with locks that all nodes"
    assert words in done.stdout


def test_a_lock_is_held_by_one_and_free_after_it(tmp_path: Path) -> None:
    lock = tmp_path / "run.lock"
    refused = pytest.raises(StorageError, match="another run is running")
    with exclusive(lock, "another run"), refused, exclusive(lock, "another run"):
        pass
    with exclusive(lock, "another run"):
        pass
