"""W&B's real library, read back from what it wrote. It is offline, or talks to a server made by hand."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_wandb import FakeWandb, serving
from logged_run import SECRET, Words, run_of, two_starts

from astar_megatron.config import ConfigError, TrackingConfig
from astar_megatron.run import dashboard_libraries
from astar_megatron.run.dashboards import FOLDER


def wandb_records(folder: Path) -> Iterator[Any]:
    """The records of W&B's own files, in order: protobuf in the blocks of a LevelDB log (32 KiB, 7 bytes a header)."""
    pytest.importorskip("wandb").teardown()  # its process has written the files to their end
    records = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.parts):
        data, place, parts = path.read_bytes(), 7, b""
        while place + 7 <= len(data):
            if (left := 32768 - place % 32768) < 7:
                place += left
                continue
            _, length, kind = struct.unpack("<IHB", data[place : place + 7])
            parts += data[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):  # whole, or the last part
                yield records.Record.FromString(parts)
                parts = b""


def items(record: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record}


def test_wandb_has_one_history_of_a_run_that_went_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    words = Words()
    two_starts(run_of(tmp_path, wandb="team/additions", wandb_mode="offline"), words)
    records = list(wandb_records(tmp_path / "run" / FOLDER))
    history = [items(record.history.item) for record in records if record.HasField("history")]
    assert [row["step"] for row in history] == [row["_step"] for row in history] == [0, 1, 2, 3]
    assert [row["reward_mean"] for row in history] == [0.5, 0.5, 0.5, 0.875]
    assert history[1]["eval/gsm8k/greedy"] == 0.25 and history[1]["eval/gsm8k/avg@4"] == 0.125
    assert history[1]["seconds/total"] == 2.0
    assert history[0]["peak_memory_bytes/1"] == 6 and "mfu" not in history[0]
    starts = [record.run for record in records if record.HasField("run")]
    assert len({start.run_id for start in starts}) == 1
    assert {(start.entity, start.project, start.display_name) for start in starts} == {("team", "additions", "run")}
    assert any("tracking.wandb: in " in text and "wandb sync" in text for text in words) and len(words) == 2


def test_wandb_has_configuration_axes_tables_and_distributions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setattr(sys, "argv", ["astar", "train", "--set", f"slurm.env=[HF_TOKEN={SECRET}]"])
    two_starts(run_of(tmp_path, wandb="additions", wandb_mode="offline"), Words())
    folder = tmp_path / "run" / FOLDER
    records = list(wandb_records(folder))
    settings = next(items(record.run.config.update) for record in records if record.HasField("run"))
    assert settings["optim"]["lr"] == 1e-6 and settings["model"]["path"] == "models/<WANDB_API_KEY>"
    axes = {record.metric.name or record.metric.glob_name: record.metric for record in records}
    history = [items(record.history.item) for record in records if record.HasField("history")]
    assert axes["*"].step_metric == "step"
    assert [row[axes["reward_mean"].step_metric] for row in history] == [1100, 1200, 1300, 1400]
    assert [row[axes["eval/*"].step_metric] for row in history] == [1000, 1100, 1200, 1300]  # of the weights before
    assert sum(history[0]["distribution/v_star/values"]) == 3  # the fourth is not a number
    assert sum(history[0]["stage_1/v_star/values"]) == 2 and "stage_1/v_star/values" not in history[1]
    summary = {key: value for record in records for key, value in items(record.summary.update).items()}
    assert summary["final/gsm8k/greedy"] == 0.75 and summary["final/evaluation"]["nrows"] == 1
    tables = {
        path.name.partition("_")[0]: json.loads(path.read_text()) for path in sorted(folder.rglob("*.table.json"))
    }
    assert tables["rollouts"]["columns"][3:5] == ["response", "reward"]
    assert tables["rollouts"]["data"][3][3:5] == ["3|3\nthe end", 0.75]
    assert (tmp_path / "run" / FOLDER / "wandb.json").exists()
    written = [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert written == []


def test_wandb_online_goes_on_with_its_run_and_gets_each_step_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb, server, words = pytest.importorskip("wandb"), FakeWandb(), Words()
    cfg = run_of(tmp_path, wandb="team/additions")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    wandb.teardown()  # so that the next start of its process takes this address
    with serving(server) as address:
        monkeypatch.setenv("WANDB_BASE_URL", address)
        dashboard_libraries.check(cfg.tracking)
        two_starts(cfg, words)
        wandb.teardown()
    assert words == [f"tracking.wandb: {address}/team/additions/runs/{server.runs[0]}"] * 2
    assert [(row["step"], row["_step"]) for row in server.history()] == [(step, step) for step in range(4)]
    assert [place for place, _ in server.lines] == [0, 1, 2, 3]  # none is written over
    assert len(server.runs) == 2 and len(set(server.runs)) == 1


def test_wandb_sync_joins_the_folders_of_a_run_that_was_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb, server = pytest.importorskip("wandb"), FakeWandb()
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    two_starts(run_of(tmp_path, wandb="team/additions", wandb_mode="offline"), Words())
    wandb.teardown()
    folders = sorted((tmp_path / "run" / FOLDER / "wandb").glob("offline-run-*"))
    with serving(server) as address:
        environment = os.environ | {"WANDB_BASE_URL": address}
        command = [sys.executable, "-m", "wandb", "sync", "--yes", *map(str, folders)]
        subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True, timeout=300)
    assert [row["step"] for row in server.history()] == [place for place, _ in server.lines] == [0, 1, 2, 3]


def test_wandb_without_a_login_is_refused_online_and_needs_none_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb").teardown()  # a session may have a login
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"tracking\.wandb: no login .* tracking\.wandb_mode=offline"):
        dashboard_libraries.check(TrackingConfig(wandb="additions"))
    dashboard_libraries.check(TrackingConfig(wandb="additions", wandb_mode="offline"))


@pytest.mark.parametrize("project", [*(f"x{sign}y" for sign in "\\#?%:-_. [],&"), "x" * 128, "x" * 129])
def test_a_project_is_refused_where_wandb_refuses_it(project: str, tmp_path: Path) -> None:
    wandb, refusals = pytest.importorskip("wandb"), []
    for make in (lambda: wandb.Settings(project=project), lambda: run_of(tmp_path, wandb=f"team/{project}")):
        try:
            make()
        except (wandb.UsageError, ConfigError) as error:
            refusals.append(error)
    assert len(refusals) in (0, 2)
