"""TensorBoard and MLflow, each the real library, read back from what it wrote; and what happens where one fails.

Nothing here reaches a network: MLflow's database is a file. W&B has a file of its own, test_wandb.py.
"""

import gc
import json
import math
import re
import sys
import threading
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import samples
from logged_run import Words, line, log, rollouts_of, run_of, two_starts
from rich.console import Console

from astar_megatron.algorithm.astar import Astar
from astar_megatron.algorithm.refresh import LiveVStar
from astar_megatron.config import AstarConfig, ConfigError, TrackingConfig
from astar_megatron.data.files import storage_error
from astar_megatron.run import dashboard_libraries
from astar_megatron.run.dashboard_libraries import About, Entry, Library
from astar_megatron.run.dashboards import FOLDER, dashboards_of
from astar_megatron.run.record import record_of
from astar_megatron.run.steps import batch_of, health_of
from astar_megatron.run.tracking import Tracker, read_metrics
from conversion.families import read_model

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


def test_tensorboard_keeps_the_last_evaluation_when_a_finished_run_is_begun_again(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    cfg = run_of(tmp_path, tensorboard=True)
    for first in (0, 2):
        with dashboards_of(cfg, first, [], {}, Words().say, close_seconds=300) as dashboards:
            for step in range(first, 2):
                log(dashboards, line(step))
            dashboards.show_final(2, {"eval": {"gsm8k": {"greedy": 0.75}}})
    events = reader.EventAccumulator(str(tmp_path / "run" / FOLDER / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("final/gsm8k/greedy")] == [(2, 0.75)]


def test_a_step_is_shown_as_the_line_that_stands_in_metrics_jsonl(tmp_path: Path, tied_llama: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    cfg, tracker = run_of(tmp_path, tensorboard=True), Tracker(tmp_path / "run", Console(quiet=True))
    rollouts, stats = rollouts_of(0)[:1], replace(samples.STATS, skipped=())
    objective = Astar(AstarConfig(), LiveVStar({"u": 0.5}, {"u": 4}, 0.5, None))
    batch = batch_of(rollouts, objective, 0)
    health = health_of(objective, rollouts, batch, stats, 1)
    evaluated = {"eval": {"prompts": {"greedy": 0.5}}}
    seconds = {"generate": 1.5, "reference": 1.5, "policy": 1.5, "publish": 1.5, "total": 1.5}
    with record_of(cfg, read_model(tied_llama), tracker, 0, None, str) as record:
        record.add(
            rollouts, batch, stats, health, seconds, evaluated | {"timeline": [("generate", "driver", 0.0, 1.5)]}
        )
        ((begun, ended),) = record.take_writes()
        assert begun < ended and not record.take_writes()
    events = reader.EventAccumulator(str(tmp_path / "run" / FOLDER / "tensorboard")).Reload()
    shown = {name: events.Scalars(name)[0].value for name in events.Tags()["scalars"]}
    (written,) = read_metrics(tmp_path / "run")
    assert shown["reward_mean"] == written["reward_mean"] == 0.0 and shown["eval/prompts/greedy"] == 0.5
    assert shown["seconds/ranks_idle"] == pytest.approx(written["seconds"]["ranks_idle"])
    no_curves = {"timeline"} | {name for name in written if written[name] is None}
    assert {name.partition("/")[0] for name in shown} == written.keys() - no_curves


def test_a_run_that_goes_on_does_not_keep_its_earlier_lines(tmp_path: Path, tied_llama: Path) -> None:
    class Lines(list[dict[str, Any]]):
        """A list that one can refer to weakly."""

    class Recalling(Tracker):
        def begin(self, step: int) -> list[dict[str, Any]]:
            lines = Lines(super().begin(step))
            self.lines = weakref.ref(lines)
            return lines

    tracker = Recalling(tmp_path / "run", Console(quiet=True))
    for step in range(3):
        tracker.log(line(step))
    cfg = run_of(tmp_path, tensorboard=True)
    with record_of(cfg, read_model(tied_llama), tracker, 3, None, str) as record:
        gc.collect()
        assert tracker.lines() is None
        assert record.spending.done == 3


# --- MLflow


class FakeMlflow:
    """The calls that are made of it; it refuses the names that mlflow 3 does."""

    def __init__(self) -> None:
        self.metrics: dict[tuple[str, int], float] = {}
        self.files: dict[str, Any] = {}

    def set_tracking_uri(self, address: str) -> None: ...

    def start_run(self, **kwargs: Any) -> Any:
        return SimpleNamespace(info=SimpleNamespace(run_id="id"), data=SimpleNamespace(params={}))

    def log_params(self, params: Mapping[str, str]) -> None:
        self.check(params)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self.check(metrics)
        self.metrics |= {(name, step): value for name, value in metrics.items()}

    def log_dict(self, content: Mapping[str, Any], path: str) -> None:
        self.files[path] = json.loads(json.dumps(content, allow_nan=False))

    def end_run(self, status: str) -> None: ...

    def check(self, names: Iterable[str]) -> None:
        if refused := [name for name in names if not re.fullmatch(r"[/\w.\- ]*", name)]:
            raise RuntimeError(f"Invalid value {refused} for parameter 'name'")


def test_mlflow_takes_every_score_by_name_and_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow, words = FakeMlflow(), Words()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    scores = {"avg@4": 0.125, "maj@4": 0.25, "pass@1": 0.5, "pass@4": 1.0, "own (new) [2]: right": 0.75}
    error = {"greedy_error": math.nan}  # of a single problem
    with dashboards_of(run_of(tmp_path, mlflow="https://x"), 0, [], {}, words.say, close_seconds=300) as dashboards:
        log(dashboards, line(0) | {"eval": {"gsm8k": scores | error}})
        log(dashboards, line(1))
    assert len(words) == 1, words[1:]
    names = ("avg_at_4", "maj_at_4", "pass_at_1", "pass_at_4", "own _new_ _2__ right")
    assert [mlflow.metrics[f"eval/gsm8k/{name}", 0] for name in names] == [*scores.values()]
    assert mlflow.metrics["reward_mean", 1] == 0.5
    (row,) = mlflow.files["evaluation/step_00000000.json"]["rows"]
    assert row["avg@4"] == 0.125 and row["greedy_error"] is None


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


@pytest.mark.parametrize(
    "key",
    [
        *("wandb=/x", "wandb=x/", "wandb=a/b/c", "wandb=x%y", "wandb=x#y", "wandb=a?/x", f"wandb={'x' * 129}"),
        *("mlflow=runs/mlruns", "mlflow=file:///x", "wandb_mode=on"),
    ],
)
def test_an_address_that_no_library_takes_is_refused(tmp_path: Path, key: str) -> None:
    name, _, value = key.partition("=")
    with pytest.raises(ConfigError, match=rf"tracking\.{name}: "):
        run_of(tmp_path, **{name: value})
