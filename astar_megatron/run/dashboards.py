"""W&B, TensorBoard and MLflow beside metrics.jsonl, which stays the one source: they get the lines that stand there.

    <run_dir>/tracking/<name>.json   the run's id there, and the first step that it has not got
    <run_dir>/tracking/              what the libraries write by themselves

Each has a thread of its own, so that no step waits for a network, and after an error it gets nothing more: this is
said, and the run goes on. When a run is begun again they get the lines of metrics.jsonl that they lack, without
distributions and tables. No step is logged twice: of steps that are taken again after an older checkpoint W&B and
MLflow keep the first values, TensorBoard has the last, as metrics.jsonl.
"""

import json
import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from astar_megatron.config import RunConfig
from astar_megatron.data.files import make_folder, write_json
from astar_megatron.run.bundle import settings_without_secrets
from astar_megatron.run.dashboard_libraries import CLOSE_SECONDS, About, Entry, Library, Table, libraries_of
from astar_megatron.types import Rollout, RolloutBatch, StepStats

FOLDER = "tracking"
_SAMPLES = 8  # rollouts shown of a step; rollouts/ has all
_TEXT = 2000  # characters shown of a prompt or response at each end
_ROLLOUTS = ("uid", "prompt", "answer", "response", "reward", "tokens", "truncated", "first_version")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Progress:
    """How far a dashboard is. `final` is the version whose final evaluation it has."""

    id: str | None = None
    next_step: int = 0
    final: int | None = None


class Dashboard:
    """A library, fed by `put` in the order of steps; `say` is called from its thread too."""

    def __init__(self, library: Library, about: About, first: int, say: Callable[[str], None]) -> None:
        self._library, self._about, self._first, self._say = library, about, first, say
        self._entries: queue.SimpleQueue[Entry | None] = queue.SimpleQueue()
        self._failed = False
        self._stopped = threading.Event()  # nothing more is wanted of it
        self._thread = threading.Thread(target=self._work, name=f"tracking.{library.name}", daemon=True)
        self._thread.start()

    def put(self, entry: Entry) -> None:
        """Have an entry logged, unless the library has had its step; returns at once."""
        if not self._stopped.is_set():
            self._entries.put(entry)

    def end(self, *, failed: bool) -> None:
        """Have what was put logged, then close; returns at once."""
        self._failed = failed
        self._entries.put(None)

    def wait(self, seconds: float) -> None:
        """Wait for the end; after so long the rest is left out, which is said."""
        self._thread.join(seconds)
        if self._thread.is_alive() and not self._stopped.is_set():
            self._stopped.set()
            self._say(f"tracking.{self._library.name}: {seconds:.0f} s were too few for what it still had to log")

    def _work(self) -> None:
        try:
            progress = self._open()
            while (entry := self._entries.get()) is not None and not self._stopped.is_set():
                progress = self._log(entry, progress)
            self._library.close(failed=self._failed)
        except Exception as error:  # whatever a library raises
            if not self._stopped.is_set():
                self._say(
                    f"tracking.{self._library.name}: {type(error).__name__}: {error}; the run goes on without it; "
                    "metrics.jsonl has all, and the same command again logs the steps after this"
                )
            self._stopped.set()
            with suppress(Exception):  # it may never have been opened
                self._library.close(failed=True)

    def _open(self) -> _Progress:
        progress = self._read()
        if self._library.rewinds:  # what it has of this step and later goes, a last evaluation too
            progress = replace(progress, next_step=min(progress.next_step, self._first), final=None)
        make_folder(self._about.folder)
        run_id, where = self._library.open(self._about, progress.id, progress.next_step)
        self._say(f"tracking.{self._library.name}: {where}")
        return self._write(replace(progress, id=run_id))

    def _log(self, entry: Entry, progress: _Progress) -> _Progress:
        """Log an entry that is new. It is noted before: should the run be killed between, none stands there twice."""
        if entry.is_final and entry.step == progress.final:
            return progress
        if not entry.is_final and entry.step < progress.next_step:
            return progress
        step, final = (progress.next_step, entry.step) if entry.is_final else (entry.step + 1, progress.final)
        progress = self._write(replace(progress, next_step=step, final=final))
        self._library.log(entry)
        return progress

    @property
    def _file(self) -> Path:
        return self._about.folder / f"{self._library.name}.json"

    def _read(self) -> _Progress:
        return _Progress(**json.loads(self._file.read_text(encoding="utf-8"))) if self._file.exists() else _Progress()

    def _write(self, progress: _Progress) -> _Progress:
        if self._stopped.is_set():
            raise TimeoutError  # the run has left this thread behind, and may have begun again
        write_json(self._file, asdict(progress))
        return progress


class Dashboards:
    """Those of a run. `beginning` are distributions from before its first step, logged with the first entry."""

    def __init__(self, dashboards: Sequence[Dashboard], beginning: Mapping[str, Sequence[float]]) -> None:
        self._dashboards, self._beginning = dashboards, beginning

    def log(self, line: Mapping[str, Any], rollouts: Sequence[Rollout], batch: RolloutBatch, stats: StepStats) -> None:
        """Show a step: its line of metrics, what its batch and responses are like, and some of these."""
        if not self._dashboards:
            return
        ratios = [a - b for a, b in zip(stats.logprobs, stats.reference_logprobs, strict=True)]
        histograms = {name: column.tolist() for name, column in batch.columns.items()}
        histograms |= {"logratio": ratios, "response_tokens": [len(rollout.token_ids) for rollout in rollouts]}
        histograms = {f"distribution/{name}": values for name, values in histograms.items()}
        known = {name: _known(values) for name, values in (histograms | dict(self._beginning)).items()}
        self._beginning = {}
        entry = _entry(line)
        self._put(
            replace(
                entry,
                histograms={name: values for name, values in known.items() if values},
                tables={**entry.tables, "rollouts": _samples(rollouts)},
            )
        )

    def show_final(self, version: int, evaluated: Mapping[str, Any]) -> None:
        """Show the evaluation of the last weights, if there is one: the scores of the run."""
        if scores := evaluated.get("eval"):
            values, tables = dict(_flat({"final": scores})), {"final/evaluation": _scores(scores)}
            self._put(Entry(step=version, is_final=True, values=values, tables=tables))

    def _put(self, entry: Entry) -> None:
        for dashboard in self._dashboards:
            dashboard.put(entry)


@contextmanager
def dashboards_of(
    cfg: RunConfig,
    first: int,
    earlier: Iterable[Mapping[str, Any]],
    beginning: Mapping[str, Sequence[float]],
    say: Callable[[str], None],
    libraries: Sequence[Library] | None = None,
    close_seconds: float = CLOSE_SECONDS,
) -> Iterator[Dashboards]:
    """Those that the configuration asks for, or `libraries`, while a run goes on from step `first`.

    `earlier` are its lines of metrics before that.
    """
    about = About(
        name=Path(cfg.run_dir).resolve().name,
        settings=settings_without_secrets(cfg),
        folder=Path(cfg.run_dir).resolve() / FOLDER,
    )
    chosen = libraries_of(cfg.tracking) if libraries is None else libraries
    dashboards = [Dashboard(library, about, first, say) for library in chosen]
    for line in earlier if dashboards else ():
        entry = _entry(line)
        for dashboard in dashboards:
            dashboard.put(entry)
    del earlier  # a long run's are much to keep while this goes on
    failed = True
    try:
        yield Dashboards(dashboards, beginning)
        failed = False
    finally:
        until = time.monotonic() + close_seconds
        for dashboard in dashboards:
            dashboard.end(failed=failed)
        for dashboard in dashboards:
            dashboard.wait(max(0.0, until - time.monotonic()))


def _entry(line: Mapping[str, Any]) -> Entry:
    tables = {"evaluation": _scores(line["eval"])} if "eval" in line else {}
    values = {name: value for name, value in line.items() if name != "timeline"}  # which is no curve
    return Entry(step=line["step"], values=dict(_flat(values)), tables=tables)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every finite number with its path; one of a list by its number."""
    for name, value in values.items():
        path = f"{prefix}{name}"
        if isinstance(value, list | tuple):
            value = {str(number): item for number, item in enumerate(value)}
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}/")
        elif isinstance(value, int | float) and math.isfinite(value):
            yield path, value


def _scores(evaluated: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row a set of problems."""
    names = list(dict.fromkeys(name for scores in evaluated.values() for name in scores))
    rows = [(problems, *(scores.get(name) for name in names)) for problems, scores in evaluated.items()]
    return Table(columns=("set", *names), rows=rows)


def _samples(rollouts: Sequence[Rollout]) -> Table:
    """Some of a step's rollouts, from its whole length."""
    shown = rollouts[:: max(1, len(rollouts) // _SAMPLES)][:_SAMPLES]
    rows = [
        (
            rollout.prompt.uid,
            _cut(rollout.prompt.text),
            rollout.prompt.answer,
            _cut(rollout.text),
            rollout.reward,
            len(rollout.token_ids),
            rollout.truncated,
            rollout.first_version,
        )
        for rollout in shown
    ]
    return Table(columns=_ROLLOUTS, rows=rows)


def _cut(text: str) -> str:
    return text if len(text) <= 2 * _TEXT else f"{text[:_TEXT]} [...] {text[-_TEXT:]}"


def _known(values: Iterable[float]) -> list[float]:
    return [float(value) for value in values if math.isfinite(value)]
