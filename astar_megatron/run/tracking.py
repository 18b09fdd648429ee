"""Metrics out: one JSON line a step always, timed spans, progress on the screen.

On a terminal progress is drawn by rich; elsewhere it is plain lines.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from astar_megatron.config_secrets import shown
from astar_megatron.data.files import storage_error, without_nan, write_atomic
from astar_megatron.types import Span, Worker, seconds_of

METRICS_FILE = "metrics.jsonl"
STAGE_1_FILE = "stage_1.jsonl"
PLACEMENT_FILE = "placement.json"  # of the run as it was last begun
_SECONDS_A_LINE = 15.0  # of waiting, where there is no terminal


class Clock:
    """What a step consists of, in spans from its making. `now` hears what the driver does or waits for."""

    def __init__(self, now: Callable[[str], None] = lambda name: None) -> None:
        self._start, self._now = time.perf_counter(), now
        self.spans: list[Span] = []

    @contextmanager
    def span(self, name: str, *busy: Worker) -> Iterator[None]:
        """Note the body as the driver's, and as that of those who are `busy` with it."""
        start = time.perf_counter()
        self._now(name)
        try:
            yield
        finally:
            self._now("")
            for who in ("driver", *busy):
                self.note(name, who, [(start, time.perf_counter())])

    def note(self, name: str, who: Worker, times: Iterable[tuple[float, float]]) -> None:
        """Note what ran from when to when, by time.perf_counter()."""
        for start, end in times:
            self.spans.append(Span(name=name, who=who, start=start - self._start, end=end - self._start))

    def note_ended(self, spans: Sequence[Span]) -> None:
        """Note what another process did by its own clock, and has ended just now."""
        shift = time.perf_counter() - self._start - max((span.end for span in spans), default=0.0)
        self.spans += [replace(span, start=span.start + shift, end=span.end + shift) for span in spans]

    def stop(self) -> dict[str, float]:
        """Return the seconds of the driver's spans and their `total`, the time since this clock was made."""
        total = time.perf_counter() - self._start
        return {**seconds_of(span for span in self.spans if span.who == "driver"), "total": total}

    def timeline(self) -> dict[str, object]:
        """Return the spans as the step's metrics have them: name, who, start and end in seconds."""
        spans = sorted(self.spans, key=lambda span: span.start)
        return {"timeline": [(span.name, span.who, round(span.start, 4), round(span.end, 4)) for span in spans]}


class _Console(Console):
    """One whose reader may go (`astar train | tee log`, ended by one Ctrl-C): the program goes on."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush at the end


class Screen:
    """Talks to the person who started a program: on a terminal by rich, elsewhere in plain lines."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or _Console(highlight=False)

    def say(self, text: str) -> None:
        """Show one line, as `shown` has it."""
        with suppress(OSError):  # the disk of a log is full
            self.console.print(shown(text), soft_wrap=True, markup=False)

    @contextmanager
    def progress(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        """Yield `advance(count)` for a task of `total` pieces: a bar on a terminal, elsewhere a line a quarter."""
        if not self.console.is_terminal:
            start, done = time.perf_counter(), 0

            def advance(count: int) -> None:
                nonlocal done
                if 4 * (done + count) // total > 4 * done // total and done + count < total:
                    self.say(f"{label}: {done + count} of {total} after {time.perf_counter() - start:.1f} s")
                done += count

            yield advance
            self.say(f"{label}: {total} in {time.perf_counter() - start:.1f} s")
            return
        columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        with Progress(*columns, console=self.console, transient=False) as bar:
            task = bar.add_task(label, total=total)
            yield lambda count: bar.update(task, advance=count)

    @contextmanager
    def waiting(
        self, label: str, now: Callable[[], str] = str, seconds_a_line: float = _SECONDS_A_LINE
    ) -> Iterator[None]:
        """Show how long the body already takes, and what `now()` says of it: on a terminal each second, else a line.

        `now` is called in another thread. At the end one line stays, unless the body failed.
        """
        start, ended = time.perf_counter(), threading.Event()

        def passed() -> str:
            return f"{label}: {time.perf_counter() - start:.0f} s" + (f"; {words}" if (words := now()) else "")

        def watch() -> None:
            if not self.console.is_terminal:
                while not ended.wait(seconds_a_line):
                    self.say(passed())
                return
            with self.console.status(Text(label)) as status:
                while not ended.wait(1.0):
                    status.update(Text(passed()))

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
        self.say(f"{label}: {time.perf_counter() - start:.1f} s")

    def table(self, title: str, rows: list[tuple[str, str]]) -> None:
        """Show two columns under a title: a table on a terminal, elsewhere a line a row."""
        if not self.console.is_terminal:
            self.say(f"{title}:")
            for name, value in rows:
                self.say(f"  {name}: {value}")
            return
        table = Table(title=Text(title), show_header=False, title_justify="left")  # of strings it takes [] for markup
        table.add_column()
        table.add_column(overflow="fold")
        for row in rows:
            table.add_row(*(Text(shown(cell)) for cell in row))
        self.console.print(table)


class Tracker(Screen):
    """Writes `<run_dir>/metrics.jsonl` and talks to the person who started the run."""

    def __init__(self, run_dir: str | Path, console: Console | None = None) -> None:
        super().__init__(console)
        self.run_dir = Path(run_dir)
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"run_dir: can't make {self.run_dir}: {error.strerror}; choose another folder") from None
        if not os.access(self.run_dir, os.W_OK | os.X_OK):
            raise ValueError(f"run_dir: can't write to {self.run_dir}; make it writable, or choose another folder")

    @property
    def metrics_path(self) -> Path:
        return self.run_dir / METRICS_FILE

    def begin(self, step: int) -> list[dict[str, Any]]:
        """Drop the lines of steps from `step` on, which a resumed run writes again, and return the others."""
        kept = [line for line in read_metrics(self.run_dir) if line["step"] < step]
        write_atomic(self.metrics_path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        return kept

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Append one line; it is on disk on return. Values that JSON can't hold (NaN, Inf) become null.

        Raises StorageError.
        """
        _append(self.metrics_path, metrics)

    def log_stage_1(self, table: Path, samples: int, response_tokens: int, seconds: float) -> None:
        """Append to `<run_dir>/stage_1.jsonl` how long a part of a sweep took; starting the engines is not in it."""
        line = {"table": str(table), "samples": samples, "response_tokens": response_tokens, "seconds": seconds}
        _append(self.run_dir / STAGE_1_FILE, line)


def _append(path: Path, line: Mapping[str, Any]) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(without_nan(line)) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise storage_error(f"{path}: can't write a line", error) from error


class _Scores(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")
    greedy: float | None = None


class _Line(BaseModel):
    """What readers of a line of metrics rely on; a step may lack all but its number, and null is no number."""

    model_config = ConfigDict(strict=True, extra="allow")
    __pydantic_extra__: dict[str, float | bool | list[Any] | None] = Field(init=False)  # type: ignore[misc]
    step: int
    seconds: dict[str, float | None] | None = None
    eval: dict[str, _Scores | None] | None = None
    timeline: list[tuple[str, str, float, float]] | None = None


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics, null for NaN and the infinities; a last line that a crash cut is left out.

    Raises ValueError, with file and line, for what a run does not write. `step` is in each line; others may lack.
    """
    path, all_metrics = Path(run_dir) / METRICS_FILE, []
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: can't read the run's metrics: {error}; repair or remove it") from error
    for number, line in enumerate(lines, start=1):
        where, got = f"{path}, line {number}", ""
        try:
            metrics = without_nan(json.loads(line))
            _Line.model_validate_json(line)
        except ValidationError as error:
            flaw = error.errors()[0]
            where, got = ", ".join([where, *map(str, flaw["loc"][:1])]), f", got {flaw['input']!r:.60}"
        except (ValueError, RecursionError):
            if number == len(lines):
                break
        else:
            all_metrics.append(metrics)
            continue
        raise ValueError(f"{where}: expected the metrics of a step as JSON{got}; repair or remove the file")
    return all_metrics


def greedy_scores(line: Mapping[str, Any]) -> dict[str, float]:
    """Return the greedy scores that a line of metrics has, by the set of problems that was evaluated."""
    sets = line.get("eval") or {}
    return {name: scores["greedy"] for name, scores in sets.items() if (scores or {}).get("greedy") is not None}


def read_stage_1_seconds(run_dir: Path, table: Path, samples: int) -> float | None:
    """Return how long drawing so many samples of a table took sweeps of this run folder; None: they drew more or fewer.

    The last line may be cut: its samples are not counted.
    """
    path, lines = run_dir / STAGE_1_FILE, []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        with suppress(ValueError):
            lines.append(json.loads(text))
    lines = [line for line in lines if line["table"] == str(table)]
    return sum(line["seconds"] for line in lines) if sum(line["samples"] for line in lines) == samples else None
