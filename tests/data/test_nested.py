"""Rows of verl and TRL: they are refused with the command that makes lines of them."""

import subprocess
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from samples import read_jsonl, write_jsonl

from astar_megatron import dataset
from astar_megatron.config import DataConfig
from astar_megatron.data.prompts import read_prompts
from astar_megatron.data.rows import PromptError

SYSTEM = {"role": "system", "content": "Answer with one number."}
WORDS = "What is 1 + 1, in 'words'?"
ASKED = {"role": "user", "content": WORDS}
OF_VERL = {"data_source": "x", "prompt": [ASKED], "reward_model": {"style": "rule", "ground_truth": "2"}}


def _refused(source: Path, question: str, answer: str, kind: str = "jsonl", **asked: Any) -> str:
    out = str(source.parent / "own.jsonl")
    with pytest.raises(PromptError) as caught:
        dataset.prepare(kind, str(source), out, question=question, answer=answer, **asked)
    return str(caught.value)


def _run(words: str) -> subprocess.CompletedProcess[str]:
    command = words.partition("; convert it: ")[2]
    return subprocess.run(command, shell=True, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("row", "question", "answer"),
    [
        (OF_VERL, "prompt", "answer"),
        (OF_VERL, "prompt.0.content", "reward_model.ground_truth"),
        (OF_VERL | {"prompt": [SYSTEM, ASKED]}, "prompt", "reward_model"),
        ({"prompt": [ASKED], "solution": 2.0}, "prompt", "solution"),
        ({"q": WORDS, "a": {"value": {"text": 2}}}, "q", "a.value.text"),
        ({"😀{0}'": [ASKED], "r": {"✓😀": "2"}}, "😀{0}'", "r.✓😀"),
    ],
)
@pytest.mark.parametrize("name", ["it's x.parquet", "x.jsonl"])
def test_messages_and_a_deep_answer_are_refused_with_the_command_that_makes_lines_of_them(
    name: str, row: dict[str, Any], question: str, answer: str, tmp_path: Path
) -> None:
    source = tmp_path / name
    pq.write_table(pa.Table.from_pylist([row]), source) if source.suffix == ".parquet" else write_jsonl(source, [row])
    words = _refused(source, question, answer)
    assert ("examples/OWN.md" in words) == ("q" not in row)
    assert _run(words).returncode == 0
    assert read_jsonl(tmp_path / f"{source.stem}_lines.jsonl") == [{"question": WORDS, "answer": "2"}]


def test_rows_that_can_be_used_are_kept_where_others_are_nested(tmp_path: Path) -> None:
    source, out = (
        write_jsonl(tmp_path / "x.jsonl", [OF_VERL, {"prompt": "1 + 1?", "answer": "2"}]),
        tmp_path / "o.jsonl",
    )
    dataset.prepare("jsonl", str(source), str(out), question="prompt", answer="answer", drop=True)
    assert read_jsonl(out) == [{"question": "1 + 1?", "answer": "2"}]


def test_rows_of_this_folder_are_refused_with_a_command_that_runs_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows").mkdir()
    write_jsonl(tmp_path / "rows" / "x.jsonl", [OF_VERL])
    monkeypatch.chdir(tmp_path / "rows")
    assert _run(_refused(Path(), "prompt", "answer")).returncode == 0
    assert len(read_jsonl(tmp_path / "rows_lines.jsonl")) == 1


def test_a_run_refuses_messages_with_the_command_too(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", [OF_VERL])
    with pytest.raises(PromptError, match=r"line 1: field 'prompt' is a list of messages, .*; convert it: "):
        read_prompts(DataConfig(path=str(source), prompt_field="prompt"), "no model")


@pytest.mark.parametrize(
    ("asked", "names", "read"),
    [
        ({}, ["train", "test"], "train"),
        ({"split": "test"}, ["train", "test"], "test"),
        ({"split": "train"}, ["train", "other"], "train"),
        ({"subset": "b"}, ["x", "b/y"], "b/y"),
        ({"subset": "b", "split": "test"}, ["test", "b/train", "b/test"], "b/test"),
    ],
)
def test_the_command_reads_the_files_that_were_asked_for(
    asked: dict[str, str], names: list[str], read: str, tmp_path: Path
) -> None:
    folder = tmp_path / "v1.0"
    (folder / "b").mkdir(parents=True)
    for name in names:
        write_jsonl(folder / f"{name}.jsonl", [OF_VERL | {"prompt": [ASKED | {"content": name}]}])
    assert _run(_refused(folder, "prompt", "answer", "hf", **asked)).returncode == 0
    lines = "_".join([folder.name, *asked.values(), "lines.jsonl"])
    assert read_jsonl(tmp_path / lines) == [{"question": read, "answer": "2"}]


@pytest.mark.parametrize(
    ("other", "line"),
    [
        (OF_VERL | {"prompt": [ASKED, ASKED]}, {"question": [ASKED, ASKED], "answer": "2"}),
        (OF_VERL | {"prompt": []}, {"question": [], "answer": "2"}),
        (OF_VERL | {"prompt": [ASKED | {"content": [1]}]}, {"question": [1], "answer": "2"}),
        (OF_VERL | {"reward_model": {"ground_truth": ["2", "3"]}}, {"question": WORDS, "answer": ["2", "3"]}),
        (OF_VERL | {"reward_model": {"ground_truth": None}}, {"question": WORDS, "answer": None}),
        ({"prompt": [ASKED], "reward_model": "ground_truth"}, {"question": WORDS, "answer": None}),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_a_row_that_can_not_be_used_is_a_line_that_is_refused(
    first: bool, other: dict[str, Any], line: dict[str, Any], tmp_path: Path
) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", [other, OF_VERL] if first else [OF_VERL, other])
    assert _run(_refused(source, "prompt", "reward_model.ground_truth")).returncode == 0
    lines = read_jsonl(tmp_path / "x_lines.jsonl")
    assert lines[0 if first else 1] == line and {"question": WORDS, "answer": "2"} in lines
    with pytest.raises(PromptError, match=f"1 of 2 rows can't be used:\n  line {1 if first else 2}: field "):
        dataset.prepare("jsonl", str(tmp_path / "x_lines.jsonl"), str(tmp_path / "own.jsonl"))


def test_the_command_stops_where_a_line_is_no_row(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", [OF_VERL, ["no object"]])
    done = _run(_refused(source, "prompt", "answer"))
    assert done.returncode and "1 of 2 rows" in done.stderr and not done.stdout
    assert not (tmp_path / "x_lines.jsonl").read_text()


def test_a_number_keeps_its_digits_in_the_lines(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"q": "pi?", "a": {"b": 3.141592653589793238462643}}')
    assert _run(_refused(tmp_path / "x.jsonl", "q", "a.b")).returncode == 0
    assert read_jsonl(tmp_path / "x_lines.jsonl") == [{"question": "pi?", "answer": "3.141592653589793238462643"}]


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"prompt": [ASKED]}, "answer"),
        (OF_VERL | {"answer": ["2"]}, "answer"),
        (OF_VERL | {"extra": {"answer": None}}, "extra.answer"),
        (OF_VERL | {"prompt": [ASKED, ASKED]}, "answer"),
        (OF_VERL | {"prompt": [{"role": "assistant", "content": "2"}]}, "answer"),
    ],
)
def test_messages_without_one_question_and_the_answer_asked_for_are_refused_without_a_command(
    row: dict[str, Any], answer: str, tmp_path: Path
) -> None:
    words = _refused(write_jsonl(tmp_path / "x.jsonl", [row]), "prompt", answer)
    assert f"text or a number at {answer!r}; the fields are {', '.join(map(repr, row))}" in words
    assert "convert it" not in words


def test_an_answer_field_that_a_text_question_has_is_not_replaced(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", [OF_VERL | {"prompt": "1 + 1?", "answer": None}])
    assert "field 'answer' is None" in _refused(source, "prompt", "answer")
