"""Profiles of steps: which are made, what is said of them, and that a disk without room ends nothing."""

import gzip
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from samples import files_of_at_most

from astar_megatron.model.backend import Backend
from astar_megatron.model.profiles import write_trace
from astar_megatron.run.profiles import profiled
from astar_megatron.types import Trace

BACKEND = Backend(name="cpu", uses_transformer_engine=False, has_triton=False, reason="a test")


class Policy:
    """Notes what it is asked; `problems` are those of its ranks, empty where a trace is written."""

    def __init__(self, *problems: str) -> None:
        self.calls: list[str] = []
        self._problems = problems

    def begin_profile(self) -> None:
        self.calls.append("begin")

    def end_profile(self, folder: Path, step: int) -> list[Trace]:
        self.calls.append(f"end {folder} {step}")
        return [Trace(path="x", num_bytes=0 if words else 2_500_000, problem=words) for words in self._problems]


@contextmanager
def recorded(name: str) -> Iterator[torch.profiler.profile]:
    """A profiler that has recorded a product in a range of this name."""
    with (profiler := BACKEND.profiler()), BACKEND.range(name):
        torch.ones(2, 2).mm(torch.ones(2, 2))
    yield profiler


def lines_of(step: int, policy: Policy) -> list[str]:
    lines: list[str] = []
    with profiled(step, [2, 5], policy, Path("runs/x"), lines.append):
        policy.calls.append("step")
    return lines


def names_in(path: Path) -> set[str]:
    with gzip.open(path) as file:
        return {event.get("name", "") for event in json.load(file)["traceEvents"]}


def test_the_steps_that_were_asked_for_are_profiled_and_no_other() -> None:
    policy = Policy("", "")
    assert lines_of(4, policy) == [] and policy.calls == ["step"]
    assert lines_of(5, policy) == ["step 5: traces of 2 of 2 ranks in runs/x/profiles (5.0 MB)"]
    assert policy.calls[1:] == ["begin", "step", "end runs/x/profiles 5"]


def test_a_trace_that_was_not_written_is_said_and_ends_nothing() -> None:
    (line,) = lines_of(2, Policy("", "/x: no room"))
    assert "traces of 1 of 2 ranks in runs/x/profiles (2.5 MB)" in line
    assert line.endswith("training goes on: /x: no room")


def test_a_step_that_failed_has_no_trace() -> None:
    policy = Policy("")
    with pytest.raises(OSError), profiled(2, [2], policy, Path("runs/x"), print):
        raise OSError
    assert policy.calls == ["begin"]


def test_a_trace_names_ranges_and_operators_and_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "profiles" / "step_00000002_rank_0.json.gz"
    for name, earlier in (("first", "second"), ("second", "first")):
        with recorded(name) as profiler:
            trace = write_trace(profiler.export_chrome_trace, path)
        assert trace == Trace(path=str(path), num_bytes=path.stat().st_size)
        assert {f"astar {name}", "aten::mm"} <= names_in(path) and f"astar {earlier}" not in names_in(path)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("num_bytes", [0, 500])
def test_without_room_there_is_the_earlier_trace_and_nothing_beside_it(num_bytes: int, tmp_path: Path) -> None:
    path = tmp_path / "trace.json.gz"
    path.write_bytes(b"earlier")
    with recorded("x") as profiler, files_of_at_most(num_bytes):
        trace = write_trace(profiler.export_chrome_trace, path)
    assert "free some space" in trace.problem
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"earlier"]


def test_a_trace_that_is_cut_where_an_event_ends_is_not_taken_for_a_whole_one(tmp_path: Path) -> None:
    with recorded("x") as profiler:
        write_trace(profiler.export_chrome_trace, tmp_path / "x.json.gz")
    whole = gzip.decompress((tmp_path / "x.json.gz").read_bytes())
    for text, is_whole in ((whole, True), (whole[: whole.rindex(b"},") + 1], False)):
        trace = write_trace(lambda name, text=text: Path(name).write_bytes(text), tmp_path / "y.json.gz")
        assert (trace.problem == "") == is_whole
    assert gzip.decompress((tmp_path / "y.json.gz").read_bytes()) == whole


def test_a_folder_that_can_not_be_made_is_said(tmp_path: Path) -> None:
    (folder := tmp_path / "profiles").write_text("a file")
    with recorded("x") as profiler:
        assert str(folder) in write_trace(profiler.export_chrome_trace, folder / "trace.json.gz").problem
