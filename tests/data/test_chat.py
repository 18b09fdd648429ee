"""A model folder's chat template: its day, the tokens it makes, where it ends a turn, and the text of a response."""

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from samples import write_jsonl
from transformers import AutoTokenizer

from astar_megatron.algorithm import rewards
from astar_megatron.config import DataConfig
from astar_megatron.data.benchmarks import benchmark_prompts
from astar_megatron.data.chat import (
    TokenizerError,
    bare_template,
    detokenizer,
    encode,
    kept_token_ids,
    names_the_day,
    stop_token_ids,
    tokenizer,
    unbegun_answer,
    unbegun_prompt,
    unstopped_turn,
)
from astar_megatron.data.prompts import PromptError, read_prompts

type MakeModel = Callable[..., str]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
# As Llama 3.2's has it, and by way of a macro.
DAY = "{% if not day is defined %}{% set day = strftime_now('%d %b %Y') %}{% endif %}{{ day }}<u>"
DAY_IN_A_MACRO = "{% macro day() %}{{ strftime_now('%H:%M %d %b %Y') }}{% endmacro %}{{ day() }}<u>"


def _file(tmp_path: Path, *questions: str) -> str:
    rows = [{"question": question, "answer": "4"} for question in questions]
    return str(write_jsonl(tmp_path / "data.jsonl", rows))


def _edit_config(model: str, **changes: Any) -> None:
    path = Path(model) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _ids(model: str, text: str) -> list[int]:
    return list(tokenizer(model)(text, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]


def _prompt(model: str, question: str) -> str:
    (ids,) = encode(model, [question], None, "here")
    return str(tokenizer(model).decode(list(ids)))


# --- code of the folder's own


TRAP = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast
Path({mark!r}).touch()
class Own(PreTrainedTokenizerFast): ...
"""


@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "Own"])
def test_a_tokenizer_s_own_code_never_runs(model_folder: MakeModel, kind: str, tmp_path: Path) -> None:
    folder, mark = Path(model_folder()), tmp_path / "ran"
    (folder / "own.py").write_text(TRAP.format(mark=str(mark)))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": kind, "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert tokenizer(str(folder)).eos_token == "</s>"
    (folder / "tokenizer.json").rename(folder / "vocab.json")  # where only the class could tell
    tokenizer.cache_clear()
    with pytest.raises(TokenizerError, match=r"no tokenizer that transformers can load: "):
        tokenizer(str(folder))
    (folder / "vocab.json").rename(folder / "tokenizer.json")
    assert not mark.exists()
    AutoTokenizer.from_pretrained(folder, trust_remote_code=True)  # it would run
    assert mark.exists()


# --- the day


@pytest.mark.parametrize(("template", "text"), [(DAY, "28 Nov 2026<u>"), (DAY_IN_A_MACRO, "00:00 28 Nov 2026<u>")])
def test_a_template_writes_the_configured_day_and_never_the_clock_s(
    model_folder: MakeModel, template: str, text: str
) -> None:
    model = model_folder(template=template)
    assert names_the_day(model) and not names_the_day(model_folder())
    (ids,) = encode(model, ["x"], "2026-11-28", "here")
    assert tokenizer(model).decode(list(ids)) == text
    (other,) = encode(model, ["x"], "2026-11-29", "here")
    assert other != ids
    with pytest.raises(TokenizerError, match=rf"data\.date: the chat template of {model} .*data\.date=20\d\d-"):
        encode(model, ["x"], None, "here")


def test_a_prompt_has_the_day_of_its_configuration_a_benchmark_s_too(tmp_path: Path, model_folder: MakeModel) -> None:
    model = model_folder(template=DAY + "{{ messages[0]['content'] }}")
    (tmp_path / "amc23.jsonl").write_text(json.dumps({"problem": "How many?", "answer": 3}))
    days = ("2026-11-28", "2026-11-29")
    for day in days:
        cfg = DataConfig(path=_file(tmp_path, "2 + 2?"), date=day)
        prompts = read_prompts(cfg, model) + benchmark_prompts("amc23", tmp_path, cfg, model)
        written = tuple(_ids(model, f"{day[-2:]} Nov 2026<u>"))
        assert [prompt.token_ids[: len(written)] for prompt in prompts] == [written] * 2
    with pytest.raises(TokenizerError, match=r"data\.date"):
        read_prompts(DataConfig(path=_file(tmp_path, "2 + 2?")), model)


def _with_bos(folder: Path, adds_bos: bool) -> Path:
    """The folder, whose tokenizer has the BOS <u> now, and begins every text with it or does not."""
    from tokenizers import Tokenizer, processors

    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": "<u>"}))
    if adds_bos:
        inner = Tokenizer.from_file(str(folder / "tokenizer.json"))
        inner.post_processor = processors.TemplateProcessing(single="<u> $A", special_tokens=[("<u>", 1)])
        inner.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_bare_template_asks_with_what_the_tokenizer_makes_of_the_text_alone(
    adds_bos: bool, model_folder: MakeModel
) -> None:
    folder = _with_bos(Path(model_folder()), adds_bos)
    bare = bare_template(str(folder))
    assert bare == "{{ bos_token }}" * adds_bos + "{{ messages[0].content }}"
    (folder / "chat_template.jinja").write_text(bare + "\n")
    tokenizer.cache_clear()
    (ids,) = encode(str(folder), ["a b\n"], None, "here")
    assert list(ids) == tokenizer(str(folder))("a b\n")["input_ids"]
    assert (ids[0] == 1) == adds_bos


def test_a_template_without_the_bos_that_the_tokenizer_adds_is_told(model_folder: MakeModel) -> None:
    bare = "{{ messages[0].content }}"
    folder = _with_bos(Path(model_folder(template=bare)), adds_bos=True)
    warning = unbegun_prompt(str(folder), None)
    assert warning is not None and "begins every text with '<u>'" in warning
    assert "at the beginning of the folder's chat_template.jinja before" in warning
    assert "{{ bos_token }}{{ messages[0].content }} asks with the text of a question alone" in warning
    (folder / "chat_template.jinja").unlink()  # where one would take the place of the setting
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": bare}))
    tokenizer.cache_clear()
    warning = unbegun_prompt(str(folder), None)
    assert warning is not None and "of chat_template in the folder's tokenizer_config.json before" in warning
    for template, adds_bos in ((bare, False), ("{{ bos_token }}" + bare, True), ("<u>" + bare, True)):
        assert unbegun_prompt(str(_with_bos(Path(model_folder(template=template)), adds_bos)), None) is None


@pytest.mark.parametrize("adds", [True, False])
def test_a_setting_that_adds_a_bos_which_the_tokenizer_does_not_add_is_told(
    adds: bool, model_folder: MakeModel
) -> None:
    folder = _with_bos(Path(model_folder(template="{{ messages[0].content }}")), adds_bos=False)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": adds}))
    assert bare_template(str(folder)) == "{{ messages[0].content }}"  # what the tokenizer itself makes of a text
    warning = unbegun_prompt(str(folder), None)
    assert adds == (warning is not None)
    assert not adds or "add_bos_token in tokenizer_config.json of" in str(warning)


# --- tokens without a row in the model


def test_a_prompt_of_a_token_without_a_row_is_refused_with_its_line(tmp_path: Path, model_folder: MakeModel) -> None:
    model = model_folder()
    exclamation, tilde = _ids(model, "!~")
    _edit_config(model, vocab_size=tilde)  # the tokenizer knows more
    assert exclamation < tilde
    assert len(read_prompts(DataConfig(path=_file(tmp_path, "a!")), model)) == 1
    message = rf"1 of 2 prompts .* first, line 2, has token '~' \({tilde}\).* vocab_size is {tilde} in .*config\.json"
    with pytest.raises(PromptError, match=message):
        read_prompts(DataConfig(path=_file(tmp_path, "a!", "a~")), model)
    (tmp_path / "amc23.jsonl").write_text(json.dumps({"problem": "a~", "answer": 3}))
    with pytest.raises(PromptError, match=r"amc23: 1 of 1 prompts .* first, line 1, has token"):
        benchmark_prompts("amc23", tmp_path, DataConfig(path="none", max_prompt_tokens=1000), model)


def test_a_stop_token_without_a_row_is_refused(model_folder: MakeModel) -> None:
    model = model_folder(stop=[0, 258])
    assert stop_token_ids(model) == (0, 258)
    _edit_config(model, vocab_size=258)
    with pytest.raises(TokenizerError, match=r"end at token .* \(258\).* vocab_size is 258"):
        stop_token_ids(model)
    unknown = model_folder(stop=[9999])  # to the tokenizer too
    with pytest.raises(TokenizerError, match=r"end at token 9999, for which the model has no row"):
        stop_token_ids(unknown)


@pytest.mark.parametrize("more", [258, [0, 258]])
def test_without_a_generation_config_a_response_ends_where_the_models_config_says(
    model_folder: MakeModel, more: Any
) -> None:
    model = model_folder()
    _edit_config(model, eos_token_id=more)
    assert stop_token_ids(model) == (0, 258)
    _edit_config(model, eos_token_id="</s>")
    with pytest.raises(TokenizerError, match=r"expected a token id, got '</s>'; repair config\.json"):
        stop_token_ids(model)
    with_file = model_folder(stop=[1])
    _edit_config(with_file, eos_token_id=more)
    assert stop_token_ids(with_file) == (0, 1)  # the file takes the config's place


@pytest.mark.parametrize("config", ["{}", '{"vocab_size": "many"}', '{"vocab_size": true}'])
def test_a_model_folder_that_does_not_say_how_many_tokens_it_has_is_refused(
    model_folder: MakeModel, config: str
) -> None:
    model = model_folder()
    (Path(model) / "config.json").write_text(config)
    with pytest.raises(TokenizerError, match=r"config\.json: .*vocab_size"):
        stop_token_ids(model)


# --- what rewards read


def test_a_reward_reads_special_tokens_but_the_one_that_ended_the_response(model_folder: MakeModel) -> None:
    model = model_folder(special=("<think>", "<answer>", "</answer>"), stop=[2])
    text = detokenizer(model)
    right = "<think>1<answer>12</answer>"
    for end in (["</s>"], ["<a>"], []):  # by either stop token, or by the token limit
        assert text(_ids(model, "".join([right, *end]))) == right
    assert rewards.get("multiply")(text(_ids(model, right + "</s>")), "12") == 1.0
    assert text(_ids(model, "1</s><u></s>")) == "1</s><u>"  # one token ended it
    assert text([]) == text(_ids(model, "</s>")) == ""
    assert kept_token_ids(model) == tuple(_ids(model, "<u><think><answer></answer>"))


# --- the end of a turn


def test_a_template_whose_end_of_a_turn_ends_no_response_is_told(model_folder: MakeModel) -> None:
    base = model_folder(template=CHATML, special=CHATML_TOKENS)
    (end,) = _ids(base, "<|im_end|>")
    warning = unstopped_turn(base, None)
    assert warning is not None and "\n" not in warning
    assert f"ends a turn with '<|im_end|>' ({end})" in warning and "ends only at '</s>' (0)" in warning
    assert f"eos_token_id in the folder's generation_config.json to [0, {end}]" in warning
    assert unstopped_turn(model_folder(template=CHATML, special=CHATML_TOKENS, stop=[0, end]), None) is None
    assert unstopped_turn(model_folder(template=CHATML, special=CHATML_TOKENS, eos="<|im_end|>"), None) is None


@pytest.mark.parametrize(
    "template",
    [
        None,  # the usual one here: nothing behind an answer
        "{% for m in messages %}<u>{{ m['content'] }}{% endfor %}<a>",  # it begins an answer, whatever is asked
        "{{ messages[0]['content'] }}<a>",  # it never writes an answer
        "{% if messages | length > 1 %}{{ raise_exception('no') }}{% endif %}{{ messages[0]['content'] }}<a>",
    ],
)
def test_a_template_that_marks_no_end_of_a_turn_is_not_accused(model_folder: MakeModel, template: str | None) -> None:
    model = model_folder() if template is None else model_folder(template=template)
    assert unstopped_turn(model, None) is None


# --- thinking, and a system message


def test_the_guides_lines_for_thinking_and_a_system_message_do_what_it_says(model_folder: MakeModel) -> None:
    guide = (Path(__file__).resolve().parents[2] / "examples/OWN.md").read_text()
    thinking, system = re.findall(r"'1i (.*)' chat_template\.jinja\n", guide)
    begun = "<|im_start|>assistant\n"
    as_qwen3 = CHATML.replace(  # which thinks unless it is told not to
        begun,
        begun + "{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}"
        "{%- endif %}",
    )
    model = model_folder(template=as_qwen3, special=CHATML_TOKENS)
    question = "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant"
    as_it_was = _prompt(model, "2 + 2?")
    assert as_it_was.startswith(question) and "<think>" not in as_it_was
    (Path(model) / "chat_template.jinja").write_text(f"{system}\n{thinking}\n{as_qwen3}")
    tokenizer.cache_clear()
    told = _prompt(model, "2 + 2?")
    assert told.startswith("<|im_start|>system\nAnswer with one number.<|im_end|>\n" + question)
    assert told.endswith("<think>\n\n</think>\n\n")


def test_the_guides_line_writes_the_template_of_a_setting_to_its_file(
    model_folder: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    guide = (Path(__file__).resolve().parents[2] / "examples/OWN.md").read_text()
    (code,) = re.findall(r'\npython -c "(.*)"\n', guide)
    folder = Path(model_folder())
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    monkeypatch.chdir(folder)
    tokenizer.cache_clear()
    exec(code, {})
    assert (folder / "chat_template.jinja").read_text() == template


# --- the beginning of an answer


WITHOUT_BEGINNING = CHATML.partition("{% if add")[0]


def test_a_template_whose_prompts_begin_no_answer_is_told(model_folder: MakeModel) -> None:
    warning = unbegun_answer(model_folder(template=WITHOUT_BEGINNING, special=CHATML_TOKENS), None)
    assert warning is not None and "\n" not in warning
    assert "takes no notice of add_generation_prompt" in warning
    assert r"it writes '<|im_start|>assistant\n' before an answer" in warning


@pytest.mark.parametrize(
    "template",
    [
        CHATML,
        "{% for m in messages %}<u>{{ m['content'] }}{% endfor %}<a>",  # it begins an answer, whatever is asked
        "{% for m in messages %}{{ m['content'] }} {% endfor %}",  # nothing stands before an answer
        "{% for m in messages %}{% if m['role'] == 'user' %}<u>{% endif %}{{ m['content'] }}"
        "{% if m['role'] == 'user' %}<a>{% endif %}{% endfor %}",  # as Mistral's
        "{{ messages[0]['content'] }}<a>",  # it never writes an answer
        "{% if messages | length > 1 %}{{ raise_exception('no') }}{% endif %}{{ messages[0]['content'] }}<a>",
    ],
)
def test_a_template_whose_prompts_begin_an_answer_is_not_accused(model_folder: MakeModel, template: str) -> None:
    assert unbegun_answer(model_folder(template=template, special=CHATML_TOKENS), None) is None


# --- control tokens in questions


def test_questions_that_hold_control_tokens_are_counted_with_their_lines(
    tmp_path: Path, model_folder: MakeModel, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_folder(template=CHATML, special=CHATML_TOKENS)
    questions = ["plain", "a <|im_end|> b", "<|im_end |>", *(f"{i} </s>" for i in range(6))]
    prompts = read_prompts(DataConfig(path=_file(tmp_path, *questions), suffix=" <u>"), model)
    assert len(prompts) == 9  # told, not left out
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "7 of 9 questions hold the text of a control token" in warning
    assert "line 2 '<|im_end|>', line 4 '</s>', line 5 '</s>', line 6 '</s>', line 7 '</s>' and 2 more" in warning
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        read_prompts(DataConfig(path=_file(tmp_path, "plain", "<im_end>"), suffix=" <u>"), model)
    assert not caplog.records


def test_prompts_with_text_that_no_token_has_are_counted_with_their_lines(
    tmp_path: Path, tied_llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    questions = ["plain", *(f"{i} ö" for i in range(6)), "<unk>"]  # the last is a control token's text
    read_prompts(DataConfig(path=_file(tmp_path, *questions)), str(tied_llama))
    control, unknown = [record.getMessage() for record in caplog.records]
    assert "1 of 8 questions hold the text of a control token" in control and "line 8 '<unk>'" in control
    assert "6 of 8 prompts hold text that the tokenizer has no token for" in unknown and "reads as '<unk>'" in unknown
    assert "line 2, line 3, line 4, line 5, line 6 and 1 more" in unknown
