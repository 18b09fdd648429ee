"""Prompts: what is read, what is refused, and the order of training."""

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from astar_megatron.config import DataConfig
from astar_megatron.data.chat import TokenizerError, stop_token_ids, tokenizer
from astar_megatron.data.prompts import PromptError, PromptStream, read_prompts
from astar_megatron.types import Prompt

type MakeModel = Callable[..., str]


@pytest.fixture(scope="module")
def model(model_folder: MakeModel) -> str:
    return model_folder()


def _file(tmp_path: Path, rows: list[Any] | bytes) -> str:
    data = rows if isinstance(rows, bytes) else b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    (tmp_path / "data.jsonl").write_bytes(data)
    return str(tmp_path / "data.jsonl")


def _row(question: str = "2 + 2?", answer: Any = "4") -> dict[str, Any]:
    return {"question": question, "answer": answer}


def test_a_prompt_is_the_user_message_in_the_model_s_template(tmp_path: Path, model: str) -> None:
    cfg = DataConfig(path=_file(tmp_path, [_row()]), suffix=" Think.")
    (prompt,) = read_prompts(cfg, model)
    assert tokenizer(model).decode(list(prompt.token_ids)) == "<u>2 + 2? Think.<a>"
    assert (prompt.text, prompt.answer, len(prompt.uid)) == ("2 + 2? Think.", "4", 32)


def test_fields_are_chosen_by_the_configuration_and_another_path_may_be_read(tmp_path: Path, model: str) -> None:
    cfg = DataConfig(path="/nowhere.jsonl", prompt_field="problem", answer_field="solution")
    (prompt,) = read_prompts(cfg, model, path=_file(tmp_path, [{"problem": "Ünïcode \U0001f986?", "solution": 4}]))
    assert (prompt.text, prompt.answer) == ("Ünïcode \U0001f986?", "4")


def test_the_uid_follows_tokens_and_answer_alone(tmp_path: Path, model: str, model_folder: MakeModel) -> None:
    first, second = read_prompts(DataConfig(path=_file(tmp_path, [_row(), _row("3 + 1?")])), model)
    third, again = read_prompts(DataConfig(path=_file(tmp_path, [_row("new"), {"x": 1, **_row()}])), model)
    assert again.uid == first.uid
    assert len({first.uid, second.uid, third.uid}) == 3
    (other_answer,) = read_prompts(DataConfig(path=_file(tmp_path, [_row(answer="5")])), model)
    (other_template,) = read_prompts(
        DataConfig(path=_file(tmp_path, [_row()])), model_folder(template="{{ messages[0]['content'] }}")
    )
    assert len({first.uid, other_answer.uid, other_template.uid}) == 3


def test_exact_duplicates_are_kept_once_and_counted(
    tmp_path: Path, model: str, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = DataConfig(path=_file(tmp_path, [_row(), _row("b"), _row(), _row()]))
    with caplog.at_level(logging.WARNING):
        assert [prompt.text for prompt in read_prompts(cfg, model)] == ["2 + 2?", "b"]
    assert "2 exact duplicates of 4 prompts dropped" in caplog.text


def test_a_byte_order_mark_blank_lines_and_crlf_are_no_trouble(tmp_path: Path, model: str) -> None:
    data = b"\xef\xbb\xbf" + json.dumps(_row()).encode() + b"\r\n\r\n  \n" + json.dumps(_row("b")).encode()
    assert len(read_prompts(DataConfig(path=_file(tmp_path, data)), model)) == 2


def test_long_prompts_are_refused_or_dropped_and_never_cut(
    tmp_path: Path, model: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = _file(tmp_path, [_row(), _row("b" * 30), _row("c" * 40)])
    message = "2 of 3 prompts exceed data.max_prompt_tokens = 20; the longest (line 3) has 42"
    with pytest.raises(PromptError, match=re.escape(message)):
        read_prompts(DataConfig(path=path, max_prompt_tokens=20), model)
    assert len(read_prompts(DataConfig(path=path, max_prompt_tokens=42), model)) == 3
    (short,) = read_prompts(DataConfig(path=path, max_prompt_tokens=20, long_prompts="drop"), model)
    assert short.text == "2 + 2?" and f"{message}; dropped" in caplog.text
    with pytest.raises(PromptError, match="3 of 3 prompts exceed"):
        read_prompts(DataConfig(path=path, max_prompt_tokens=1, long_prompts="drop"), model)


def test_a_folder_without_a_usable_tokenizer_is_refused(tmp_path: Path, model_folder: MakeModel) -> None:
    (tmp_path / "empty").mkdir()
    for folder, message in (
        (str(tmp_path / "none"), "no such folder"),
        (str(tmp_path / "empty"), "no tokenizer that transformers can load"),
        (model_folder(eos=None), "no EOS token"),
    ):
        with pytest.raises(TokenizerError, match=message):
            read_prompts(DataConfig(path=_file(tmp_path, [_row()])), folder)


def test_stop_tokens_are_the_tokenizer_s_then_those_of_the_generation_config(model_folder: MakeModel) -> None:
    eos = tokenizer(folder := model_folder()).eos_token_id
    assert stop_token_ids(folder) == (eos,)
    assert stop_token_ids(model_folder(stop=eos)) == (eos,)
    assert stop_token_ids(model_folder(stop=[7, eos, 9, 7])) == (eos, 7, 9)
    broken = model_folder()
    for text, words in (
        ("[]", r"generation_config\.json: not readable"),
        ('{"eos_token_id": "</s>"}', r"eos_token_id: expected a token id, got '</s>'; repair generation_config\.json"),
    ):
        (Path(broken) / "generation_config.json").write_text(text)
        with pytest.raises(TokenizerError, match=words):
            stop_token_ids(broken)


def _prompts(number: int) -> list[Prompt]:
    return [Prompt(uid=f"u{i}", token_ids=(i,), text="", answer="") for i in range(number)]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(number=st.integers(1, 20), batch_size=st.integers(1, 30), seed=st.integers(0, 3))
def test_each_prompt_comes_exactly_once_an_epoch(number: int, batch_size: int, seed: int) -> None:
    stream = PromptStream(_prompts(number), batch_size, seed)
    taken = [prompt.uid for _ in range(number) for prompt in stream.take()]  # `batch_size` whole epochs
    assert len(taken) == number * batch_size
    for epoch in range(batch_size):
        assert len(set(taken[epoch * number : (epoch + 1) * number])) == number


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(number=st.integers(1, 20), batch_size=st.integers(1, 30), before=st.integers(0, 12))
def test_resuming_gives_the_batches_that_would_have_come(number: int, batch_size: int, before: int) -> None:
    stream = PromptStream(_prompts(number), batch_size, seed=5)
    for _ in range(before):
        stream.take()
    state = json.loads(json.dumps(stream.state()))
    resumed = PromptStream(_prompts(number)[::-1], batch_size, seed=5)  # the file's order does not matter
    resumed.restore(state)
    assert [resumed.take() for _ in range(5)] == [stream.take() for _ in range(5)]


def test_the_order_differs_by_seed_and_epoch_and_is_the_same_everywhere() -> None:
    stream = PromptStream(_prompts(6), 6, seed=0)
    first, second = ([prompt.uid for prompt in stream.take()] for _ in range(2))
    other = [prompt.uid for prompt in PromptStream(_prompts(6), 6, seed=1).take()]
    assert len({tuple(first), tuple(second), tuple(other)}) == 3
    assert first == ["u2", "u5", "u4", "u1", "u0", "u3"]  # a library's new version must not change running studies


def test_a_cursor_of_other_prompts_or_seed_is_refused() -> None:
    state = PromptStream(_prompts(6), 2, seed=0).state()
    for stream, message in (
        (PromptStream(_prompts(5), 2, seed=0), "its prompts are not those"),
        (PromptStream(_prompts(6), 2, seed=1), "seed: 1, but .* is of 0"),
    ):
        with pytest.raises(PromptError, match=message):
            stream.restore(state)
    stream = PromptStream(_prompts(6), 2, seed=0)
    for wrong in ({}, state | {"taken": 7}, state | {"epoch": -1}, state | {"epoch": "1"}):
        with pytest.raises(PromptError):
            stream.restore(wrong)


@pytest.mark.parametrize(
    ("prompts", "batch_size", "words"),
    [([], 2, "got 0 and 2"), (_prompts(3), 0, "got 3 and 0"), (_prompts(3) * 2, 2, "same uid")],
    ids=["no prompt", "no batch", "a prompt twice"],
)
def test_a_stream_needs_distinct_prompts_and_a_batch_size(prompts: list[Prompt], batch_size: int, words: str) -> None:
    with pytest.raises(PromptError, match=words):
        PromptStream(prompts, batch_size, seed=0)
