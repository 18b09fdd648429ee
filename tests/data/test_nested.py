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
ASKED = {"role": "user", "content": "What is 1 + 1, in 'words'?"}
OF_VERL = {"data_source": "x", "prompt": [ASKED], "reward_model": {"style": "rule", "ground_truth": "2"}}


def _refused(source: Path, question: str, answer: str) -> str:
    with pytest.raises(PromptError) as caught:
        dataset.prepare("jsonl", str(source), str(source.parent / "own.jsonl"), question=question, answer=answer)
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
        ({"q": ASKED["content"], "a": {"value": {"text": 2}}}, "q", "a.value.text"),
    ],
)
@pytest.mark.parametrize("name", ["it's x.parquet", "x.jsonl"])
def test_messages_and_a_deep_answer_are_refused_with_the_command_that_makes_lines_of_them(
    name: str, row: dict[str, Any], question: str, answer: str, tmp_path: Path
) -> None:
    source = tmp_path / name
    pq.write_table(pa.Table.from_pylist([row]), source) if source.suffix == ".parquet" else write_jsonl(source, [row])
    words = _refused(source, question, answer)
    assert ("examples/OWN.md" in words) == ("prompt" in row)
    assert _run(words).returncode == 0
    assert read_jsonl(tmp_path / f"{source.stem}_lines.jsonl") == [{"question": ASKED["content"], "answer": "2"}]


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
    ("second", "message"),
    [
        (OF_VERL | {"prompt": [ASKED, ASKED]}, "too many values"),
        (OF_VERL | {"prompt": [ASKED | {"content": [{"type": "text"}]}]}, "field 'content' is list, expected text"),
        (OF_VERL | {"reward_model": {"ground_truth": ["2", "3"]}}, "is list, expected text; repair it or name another"),
        (["no object"], "1 of 2 rows"),
    ],
)
def test_the_command_stops_at_a_row_that_it_can_not_make_a_line_of(second: Any, message: str, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", [OF_VERL, second])
    done = _run(_refused(source, "prompt", "answer"))
    assert done.returncode and message in done.stderr and not done.stdout
    assert not (tmp_path / "x_lines.jsonl").read_text()


def test_an_answer_that_is_nowhere_is_named_by_the_command(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", [{"prompt": [ASKED]}])
    assert "no field 'answer', only 'prompt'; name another" in _run(_refused(source, "prompt", "answer")).stderr
