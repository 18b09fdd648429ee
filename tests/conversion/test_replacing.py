"""What stands at a destination while an export is written, when its process is killed, and what is never deleted."""

import json
import logging
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_models import config

from astar_megatron.cluster.signals import RESUME
from conversion import hf
from conversion.families import model_from_config
from conversion.folders import ModelFolderError, check_destination, replacing, write_json

ROOT = Path(__file__).resolve().parents[2]
WRITES = """
import sys, time
from conversion import folders
with folders.replacing(sys.argv[1]) as new:
    (new / "conversion.json").write_text("{}")
    print("writing", flush=True)
    if sys.argv[2] == "swap":  # killed between the two renames
        folders._sync = lambda path: None
        rename = type(new).rename
        type(new).rename = lambda path, to: rename(path, to) and path.name != "out" or time.sleep(60)
    else:
        time.sleep(60)
"""


def writer(folder: Path, where: str = "block") -> subprocess.Popen[str]:
    """A process in the middle of `replacing`."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITES, str(folder), where], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    return process


def export(folder: Path, text: str) -> None:
    with replacing(folder) as new:
        write_json(new / "conversion.json", text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_a_killed_process_left_is_removed_by_the_next_and_a_living_one_s_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    killed, living = (writer(tmp_path / "out") for _ in range(2))
    killed.kill()
    killed.wait()
    assert len(names(tmp_path)) == 2
    (tmp_path / ".out.new-mine").mkdir()  # somebody's
    with caplog.at_level(logging.WARNING):
        export(tmp_path / "out", "good")
    assert "which a killed process had left" in caplog.text
    assert len(names(tmp_path)) == 3 and "out" in names(tmp_path) and ".out.new-mine" in names(tmp_path)
    living.kill()
    living.wait()
    export(tmp_path / "out", "better")
    assert names(tmp_path) == [".out.new-mine", "out"]


def test_an_export_that_a_killed_process_had_taken_away_is_put_back(tmp_path: Path) -> None:
    export(tmp_path / "out", "old")
    process = writer(tmp_path / "out", "swap")
    deadline = time.monotonic() + 30
    while (tmp_path / "out").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    with pytest.raises(RuntimeError), replacing(tmp_path / "out"):
        raise RuntimeError
    assert names(tmp_path) == ["out"]
    assert json.loads((tmp_path / "out" / "conversion.json").read_text()) == "old"


def test_a_terminated_conversion_removes_what_it_wrote(tmp_path: Path) -> None:
    """600 MB of zeros."""
    sizes = {"vocab_size": 140_000, "hidden_size": 2048, "intermediate_size": 64, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(model_from_config(config("llama", **sizes)).config))
    with hf.writing(tmp_path / "source", tmp_path, torch.bfloat16) as made:
        made.record["digests"] = {}
    before = names(tmp_path)
    command = [sys.executable, "-m", "astar_megatron.cli", "convert", "hf-to-megatron"]
    command += [str(tmp_path / name) for name in ("source", "out")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob(".out.new-*/new/*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, names(tmp_path)) == (RESUME, before), error
    assert "Traceback" not in error


def test_no_file_is_deleted_that_an_export_does_not_have(tmp_path: Path) -> None:
    export(tmp_path / "out", "old")
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.old" / "notes.txt").write_text("somebody's")
    export(tmp_path / "out", "new")
    assert (tmp_path / ".out.old" / "notes.txt").exists()
    (tmp_path / "out" / "results.csv").write_text("mine")
    for refusing in (lambda: check_destination(tmp_path / "out"), lambda: export(tmp_path / "out", "newer")):
        with pytest.raises(ModelFolderError, match=r"holds files that no export has: results\.csv"):
            refusing()
    (tmp_path / "out" / "results.csv").unlink()
    with pytest.raises(ModelFolderError, match=r"results\.csv"), replacing(tmp_path / "out"):
        (tmp_path / "out" / "results.csv").write_text("put there meanwhile")
    assert (tmp_path / "out" / "results.csv").exists()


def test_a_new_export_is_for_whom_the_old_one_was(tmp_path: Path) -> None:
    export(tmp_path / "out", "old")
    for mode in (0o700, 0o2750):
        (tmp_path / "out").chmod(mode)
        export(tmp_path / "out", "new")
        assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == mode


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become a user who may not write")
def test_an_export_that_can_t_be_moved_away_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    export(tmp_path / "out", "old")
    for path in tmp_path.parents:
        if path.stat().st_mode & 0o055 != 0o055:
            path.chmod(path.stat().st_mode | 0o055)
    tmp_path.chmod(0o777)
    os.seteuid(65534)
    try:
        with pytest.raises(PermissionError, match="out: Permission denied; choose another destination"):
            check_destination(tmp_path / "out")
    finally:
        os.seteuid(0)


def test_the_current_folder_is_no_destination(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To replace it would leave the program in a folder that is gone."""
    monkeypatch.chdir(tmp_path)
    for name in (".", "", str(tmp_path)):
        with pytest.raises(
            ModelFolderError, match="is the current folder, which would be replaced: choose a folder in"
        ):
            check_destination(name)
