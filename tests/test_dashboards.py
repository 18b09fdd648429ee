"""W&B, TensorBoard and MLflow, each the real library, read back from what it wrote; and what happens where one fails.

Nothing here reaches a network: W&B is offline or talks to a server made by hand, MLflow's database is a file.
"""

import json
import re
import struct
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import samples
import torch
from fake_wandb import FakeWandb, serving
from rich.console import Console

from astar_megatron import config
from astar_megatron.algorithm.astar import Astar
from astar_megatron.algorithm.refresh import LiveVStar
from astar_megatron.config import AstarConfig, ConfigError, RunConfig, TrackingConfig
from astar_megatron.data.files import storage_error
from astar_megatron.run import dashboard_libraries
from astar_megatron.run.dashboard_libraries import About, Entry, Library
from astar_megatron.run.dashboards import FOLDER, Dashboards, dashboards_of
from astar_megatron.run.record import record_of
from astar_megatron.run.steps import batch_of, health_of
from astar_megatron.run.tracking import Tracker, read_metrics
from astar_megatron.types import Prompt, Rollout, RolloutBatch
from conversion.families import read_model

SECRET = "not-to-be-written-" + "7f3a"
PROMPT = Prompt(uid="u", token_ids=(1, 3), text="What is 1 + 1?", answer="2")


def line(step: int, *, reward: float = 0.5, evaluated: bool = False) -> dict[str, Any]:
    metrics: dict[str, Any] = {
        "step": step,
        "reward_mean": reward,
        "mfu": None,
        "spent_tokens": 100 * (step + 1),
        "peak_memory_bytes": [5, 6],
        "seconds": {"total": 2.0, "policy": 1.0},
    }
    scores = {"greedy": 0.25, "formatted": None, "avg@4": 0.125, "maj@4": 0.25, "pass@2": 0.5}
    return metrics | ({"eval": {"gsm8k": scores}} if evaluated else {})


def rollouts_of(step: int) -> list[Rollout]:
    return [samples.rollout(PROMPT, text=f"{step}|{n}\nthe end", reward=n / 4, sample=n) for n in range(4)]


def log(dashboards: Dashboards, metrics: Mapping[str, Any]) -> None:
    rollouts = rollouts_of(metrics["step"])
    batch = RolloutBatch(
        token_ids=tuple(PROMPT.token_ids + rollout.token_ids for rollout in rollouts),
        prompt_tokens=(2,) * 4,
        columns={"v_star": torch.tensor([0.1, 0.2, 0.2, float("nan")], dtype=torch.float64)},
        version=metrics["step"],
    )
    stats = replace(samples.STATS, logprobs=(-1.0,) * 4, reference_logprobs=(-2.0, -1.0, -1.0, -1.0))
    dashboards.log(metrics, rollouts, batch, stats)


def run_of(folder: Path, **tracking: Any) -> RunConfig:
    return config.validate(
        {
            "run_dir": str(folder / "run"),
            "model": {"path": f"models/{SECRET}"},
            "data": {"path": "some.jsonl"},
            "reward": {"name": "last_number"},
            "tracking": tracking,
        }
    )


class Words(list[str]):
    """What the screen was told."""

    def say(self, text: str) -> None:
        self.append(text)


def two_starts(cfg: RunConfig, words: Words) -> None:
    """Steps 0 to 2 and the last evaluation; then on from step 1, again to 3, with a line that only the file has."""
    beginning = {"stage_1/v_star": [0.0, 0.5]}
    with dashboards_of(cfg, 0, [], beginning, words.say, close_seconds=300) as dashboards:
        for step in range(3):
            log(dashboards, line(step, evaluated=step == 1))
        dashboards.show_final(3, {"eval": {"gsm8k": {"greedy": 0.75}}})
    with dashboards_of(cfg, 1, [line(0)], {}, words.say, close_seconds=300) as dashboards:
        for step in range(1, 4):
            log(dashboards, line(step, reward=0.875))


# --- Weights & Biases


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
    two_starts(run_of(tmp_path, wandb="additions", wandb_mode="offline"), Words())
    folder = tmp_path / "run" / FOLDER
    records = list(wandb_records(folder))
    settings = next(items(record.run.config.update) for record in records if record.HasField("run"))
    assert settings["optim"]["lr"] == 1e-6 and settings["model"]["path"] == "models/<WANDB_API_KEY>"
    axes = {record.metric.name or record.metric.glob_name: record.metric for record in records}
    assert axes["*"].step_metric == "step" and axes["reward_mean"].step_metric == "spent_tokens"
    history = [items(record.history.item) for record in records if record.HasField("history")]
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


# --- TensorBoard


def test_tensorboard_has_the_last_values_of_a_run_that_went_back(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    two_starts(run_of(tmp_path, tensorboard=True), Words())
    events = reader.EventAccumulator(
        str(tmp_path / "run" / FOLDER / "tensorboard"),
        size_guidance=dict.fromkeys(("scalars", "tensors", "histograms"), 0),
    ).Reload()
    rewards = [(event.step, event.value) for event in events.Scalars("reward_mean")]
    assert rewards == [(0, 0.5), (1, 0.875), (2, 0.875), (3, 0.875)]
    assert [event.step for event in events.Histograms("distribution/v_star")] == [0, 1, 2, 3]
    assert events.Histograms("stage_1/v_star")[0].histogram_value.num == 2
    text = events.Tensors("rollouts/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "| 3\\|3<br>the end | 0.75 |" in text


def test_a_step_is_shown_as_the_line_that_stands_in_metrics_jsonl(tmp_path: Path, tied_llama: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    cfg, tracker = run_of(tmp_path, tensorboard=True), Tracker(tmp_path / "run", Console(quiet=True))
    rollouts, stats = rollouts_of(0)[:1], replace(samples.STATS, skipped=())
    objective = Astar(AstarConfig(), LiveVStar({"u": 0.5}, {"u": 4}, 0.5, None))
    batch, health = batch_of(rollouts, objective, 0), health_of(objective, rollouts, stats, 0, 1)
    evaluated = {"eval": {"prompts": {"greedy": 0.5}}}
    seconds = {"generate": 1.5, "reference": 1.5, "policy": 1.5, "publish": 1.5, "total": 1.5}
    with record_of(cfg, read_model(tied_llama), tracker, 0, None, str) as record:
        record.add(
            rollouts, batch, stats, health, seconds, evaluated | {"timeline": [("generate", "driver", 0.0, 1.5)]}
        )
    events = reader.EventAccumulator(str(tmp_path / "run" / FOLDER / "tensorboard")).Reload()
    shown = {name: events.Scalars(name)[0].value for name in events.Tags()["scalars"]}
    (written,) = read_metrics(tmp_path / "run")
    assert shown["reward_mean"] == written["reward_mean"] == 0.0 and shown["eval/prompts/greedy"] == 0.5
    assert shown["seconds/ranks_idle"] == pytest.approx(written["seconds"]["ranks_idle"])
    no_curves = {"timeline"} | {name for name in written if written[name] is None}
    assert {name.partition("/")[0] for name in shown} == written.keys() - no_curves


# --- MLflow


class FakeMlflow:
    """The calls that are made of it; it refuses the names that mlflow 3 does."""

    def __init__(self) -> None:
        self.metrics: dict[tuple[str, int], float] = {}

    def set_tracking_uri(self, address: str) -> None: ...

    def start_run(self, **kwargs: Any) -> Any:
        return SimpleNamespace(info=SimpleNamespace(run_id="id"), data=SimpleNamespace(params={}))

    def log_params(self, params: Mapping[str, str]) -> None:
        self.check(params)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self.check(metrics)
        self.metrics |= {(name, step): value for name, value in metrics.items()}

    def log_dict(self, content: Mapping[str, Any], path: str) -> None: ...

    def end_run(self, status: str) -> None: ...

    def check(self, names: Iterable[str]) -> None:
        if refused := [name for name in names if not re.fullmatch(r"[/\w.\- ]*", name)]:
            raise RuntimeError(f"Invalid value {refused} for parameter 'name'")


def test_mlflow_takes_the_name_of_every_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow, words = FakeMlflow(), Words()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    scores = {"avg@4": 0.125, "maj@4": 0.25, "pass@1": 0.5, "pass@4": 1.0, "own (new) [2]: right": 0.75}
    with dashboards_of(run_of(tmp_path, mlflow="https://x"), 0, [], {}, words.say, close_seconds=300) as dashboards:
        log(dashboards, line(0) | {"eval": {"gsm8k": scores}})
        log(dashboards, line(1))
    assert len(words) == 1, words[1:]
    names = ("avg_at_4", "maj_at_4", "pass_at_1", "pass_at_4", "own _new_ _2__ right")
    assert [mlflow.metrics[f"eval/gsm8k/{name}", 0] for name in names] == [*scores.values()]
    assert mlflow.metrics["reward_mean", 1] == 0.5


@pytest.mark.slow  # MLflow makes a database of dozens of migrations: 10 s, on a busy disk minutes
def test_mlflow_has_one_history_of_a_run_that_went_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)  # beside a database MLflow keeps files in the current folder
    address = f"sqlite:///{tmp_path}/mlflow.db"
    two_starts(run_of(tmp_path, mlflow=address), Words())
    client = mlflow.MlflowClient(address)
    (run,) = client.search_runs(["0"])
    rewards = [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, "reward_mean")]
    assert rewards == [(0, 0.5), (1, 0.5), (2, 0.5), (3, 0.875)]
    assert run.data.metrics["eval/gsm8k/avg_at_4"] == 0.125 and run.data.metrics["eval/gsm8k/pass_at_2"] == 0.5
    assert run.info.run_name == "run" and run.info.status == "FINISHED"
    assert run.data.params["optim.lr"] == "1e-06" and run.data.metrics["final/gsm8k/greedy"] == 0.75
    rows = mlflow.artifacts.load_dict(f"{run.info.artifact_uri}/rollouts/step_00000003.json")["rows"]
    assert rows[1]["reward"] == 0.25


# --- whatever the library


class Memory:
    """A library that keeps what it gets; from step `fails_at` on its disk is full."""

    name, rewinds = "memory", False

    def __init__(self, fails_at: int | None = None, waits: threading.Event | None = None) -> None:
        self.entries: list[Entry] = []
        self.fails_at, self.waits = fails_at, waits
        self.calls: list[str] = []

    def open(self, about: About, run_id: str | None, first: int) -> tuple[str, str]:
        self.calls.append(f"open {run_id} {first}")
        return "id", "in memory"

    def log(self, entry: Entry) -> None:
        if self.waits:
            self.waits.wait()
        if self.fails_at is not None and entry.step >= self.fails_at:
            raise storage_error("history: can't write", OSError(28, "No space left on device"))
        self.entries.append(entry)

    def close(self, *, failed: bool) -> None:
        self.calls.append(f"close {failed}")


def fed(tmp_path: Path, library: Library, first: int, steps: range, words: Words, seconds: float = 60.0) -> None:
    earlier = [line(step) for step in range(first)]
    with dashboards_of(run_of(tmp_path), first, earlier, {}, words.say, [library], seconds) as dashboards:
        for step in steps:
            log(dashboards, line(step))


def test_a_library_that_fails_is_said_once_and_gets_what_it_lacks_at_the_next_start(tmp_path: Path) -> None:
    words, library, other = Words(), Memory(fails_at=1), Memory()
    fed(tmp_path, library, 0, range(4), words)
    assert [entry.step for entry in library.entries] == [0]
    assert len(words) == 2 and "No space left" in words[1] and "the run goes on without it" in words[1]
    fed(tmp_path, other, 4, range(4, 5), words)
    assert other.calls == ["open id 2", "close False"]
    assert [entry.step for entry in other.entries] == [2, 3, 4]
    assert other.entries[0].values["seconds/total"] == 2.0 and not other.entries[0].tables


def test_a_library_that_hangs_holds_up_neither_steps_nor_the_end(tmp_path: Path) -> None:
    words, never = Words(), threading.Event()
    library = Memory(waits=never)
    fed(tmp_path, library, 0, range(3), words, seconds=0.05)
    assert "too few" in words[-1] and not library.entries
    never.set()


def test_an_error_of_the_run_ends_it_as_failed_everywhere(tmp_path: Path) -> None:
    library = Memory()
    shown = dashboards_of(run_of(tmp_path), 0, [], {}, Words().say, [library])
    with pytest.raises(ZeroDivisionError), shown as dashboards:
        log(dashboards, line(0))
        raise ZeroDivisionError
    assert library.calls == ["open None 0", "close True"] and len(library.entries) == 1


def test_a_last_evaluation_is_shown_once_and_takes_no_step_from_a_longer_run(tmp_path: Path) -> None:
    first, second = Memory(), Memory()
    for library, steps in ((first, range(2)), (second, range(2, 3))):
        with dashboards_of(run_of(tmp_path), steps.start, [], {}, Words().say, [library]) as dashboards:
            for _ in range(2):
                dashboards.show_final(2, {"eval": {"gsm8k": {"greedy": 0.5}}})
            for step in steps:
                log(dashboards, line(step))
    assert [(entry.step, entry.is_final) for entry in first.entries] == [(2, True), (0, False), (1, False)]
    assert [(entry.step, entry.is_final) for entry in second.entries] == [(2, False)]
    assert first.entries[0].values == {"final/gsm8k/greedy": 0.5}


def test_a_library_that_is_not_installed_is_refused_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)  # as if it were not there
    with pytest.raises(ValueError, match=r"tracking\.mlflow: .* install astar-megatron\[mlflow\]"):
        dashboard_libraries.check(TrackingConfig(mlflow="sqlite:///x.db"))
    dashboard_libraries.check(TrackingConfig())


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


@pytest.mark.parametrize("key", ["wandb=/x", "wandb=x/", "mlflow=runs/mlruns", "mlflow=file:///x", "wandb_mode=on"])
def test_an_address_that_no_library_takes_is_refused(tmp_path: Path, key: str) -> None:
    name, _, value = key.partition("=")
    with pytest.raises(ConfigError, match=rf"tracking\.{name}: "):
        run_of(tmp_path, **{name: value})
