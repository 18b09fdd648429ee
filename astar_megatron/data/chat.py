"""A model folder's tokenizer and chat template: the tokens that the model reads, where a response ends, and its text.

A template never sees the clock: where it asks for the time (`strftime_now`, as Llama 3.2's does for the day), it gets
the configured `data.date`, or the run is refused. A token that the model has no row for is refused too. Leaves out:
several turns, tools, images, and a template's jinja filter `random`.
"""

import datetime
import functools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from astar_megatron.data import tokenizer_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ENCODE_AT_ONCE = 4096  # texts a tokeniser call
_QUESTION, _ANSWER = "A question of nobody.", "An answer of nobody."  # texts that no template writes by itself

_BOS, _TEXT = "{{ bos_token }}", "{{ messages[0].content }}"  # in a chat template
_COMPARED = 64  # prompts

type Chat = list[dict[str, str]]


class TokenizerError(ValueError):
    """A model folder without a tokenizer that can format a chat and end a response."""


@functools.lru_cache(maxsize=4)
def tokenizer(model_path: str) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of an HF folder, as `tokenizer_folder.load` reads it; kept for the process.

    Raises TokenizerError.
    """
    if not Path(model_path).is_dir():
        raise TokenizerError(f"model.path: no such folder: {model_path}; give a Hugging Face folder on this machine")
    try:
        tok = tokenizer_folder.load(model_path)
    except Exception as error:  # for a damaged file transformers raises KeyError, its Rust part bare Exceptions
        raise TokenizerError(
            f"model.path: {model_path} has no tokenizer that transformers can load: {error!r:.500}; "
            "add tokenizer.json and tokenizer_config.json of the model"
        ) from error
    if not tok.chat_template:
        raise TokenizerError(
            f"model.path: the tokenizer of {model_path} has no chat template; add chat_template.jinja to the folder; "
            f"{_bare_template(tok)} in it asks a base model with the text of a question alone"
        )
    if tok.eos_token_id is None:
        raise TokenizerError(
            f"model.path: the tokenizer of {model_path} has no EOS token, so no response could end; "
            "set eos_token in tokenizer_config.json"
        )
    if tok.eos_token_id in tokenizer_folder.invented(tok):
        raise TokenizerError(
            f"model.path: no file of the tokenizer in {model_path} has the EOS token {tok.eos_token!r}, so no response "
            "could end; set eos_token in tokenizer_config.json to the one that the model learnt"
        )
    return tok


def bare_template(model_path: str) -> str:
    """Return the chat template that asks with the text of a question alone, as the tokenizer by itself reads it."""
    return _bare_template(tokenizer(model_path))


def _bare_template(tok: "PreTrainedTokenizerBase") -> str:
    return _BOS * _adds_bos(tok) + _TEXT


def _adds_bos(tok: "PreTrainedTokenizerBase") -> bool:
    return tok.bos_token_id is not None and tok("x")["input_ids"][:1] == [tok.bos_token_id]  # type: ignore[index]


def vocab_size(model_path: str) -> int:
    """Return how many token ids the model has rows for, by its config.json. Raises TokenizerError."""
    file = Path(model_path) / "config.json"
    try:
        size = json.loads(file.read_bytes())["vocab_size"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise TokenizerError(f"{file}: can't read vocab_size: {error!r}; repair the file") from error
    if type(size) is not int or size < 1:
        raise TokenizerError(f"{file}: vocab_size={size!r}, expected a whole number of at least 1; repair the file")
    return size


def no_row(model_path: str, token_id: int) -> str:
    """Return in words that the model has no row for a token, and what to do."""
    return (
        f"token {_named(tokenizer(model_path), token_id)}, for which the model has no row: vocab_size is "
        f"{vocab_size(model_path)} in {model_path}/config.json; give the folder the tokenizer that belongs to the "
        "model, or a model whose embedding was resized to this tokenizer"
    )


def stop_token_ids(model_path: str) -> tuple[int, ...]:
    """Return the ids that end a response: the tokenizer's EOS, then those of generation_config.json that differ.

    Without that file those of config.json, as transformers has it. Raises TokenizerError, for an id that the model has
    no row for too.
    """
    size = vocab_size(model_path)
    file = Path(model_path) / "generation_config.json"
    file = file if file.is_file() else Path(model_path) / "config.json"
    try:
        more = json.loads(file.read_bytes()).get("eos_token_id")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise TokenizerError(f"{file}: not readable as a JSON object: {error}; repair or delete it") from error
    more = [value for value in (more if isinstance(more, list) else [more]) if value is not None]
    ids = [_token_id(value, file.name) for value in (tokenizer(model_path).eos_token_id, *more)]
    if beyond := [token_id for token_id in ids if token_id >= size]:
        raise TokenizerError(
            f"model.path: a response is to end at {no_row(model_path, beyond[0])}, or repair eos_token in "
            f"tokenizer_config.json and eos_token_id in {file.name}"
        )
    return tuple(dict.fromkeys(ids))


def control_tokens(model_path: str) -> dict[str, int]:
    """Return the tokenizer's special tokens, text and id: those that mean something to the model beside their text."""
    added = tokenizer(model_path).added_tokens_decoder
    return {token.content: token_id for token_id, token in sorted(added.items()) if token.special}


def kept_token_ids(model_path: str) -> tuple[int, ...]:
    """Return the special tokens that a response's text keeps: all but those that end it, by their ids."""
    stops = stop_token_ids(model_path)
    return tuple(token_id for token_id in control_tokens(model_path).values() if token_id not in stops)


def control_tokens_in(model_path: str, texts: Sequence[str]) -> list[tuple[int, str]]:
    """Return (index, control token) of the texts that hold what the tokenizer reads as one; the first of each text."""
    tok, ids = tokenizer(model_path), control_tokens(model_path)
    if not ids:
        return []
    longest_first = sorted(ids, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first)))
    hits = []
    for index, text in enumerate(texts):
        if written := list(dict.fromkeys(pattern.findall(text))):
            read = set(tok(text, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]
            hits += [(index, token) for token in written if ids[token] in read][:1]
    return hits


def encode(model_path: str, messages: Sequence[str], date: str | None, source: object) -> list[tuple[int, ...]]:
    """Return the token ids of one user message each in the model's template, up to where the answer begins.

    `date` (2026-11-28) is the day that the template may name. Raises TokenizerError, for a token that no file of the
    tokenizer has too.
    """
    tok, encoded = tokenizer(model_path), list[tuple[int, ...]]()
    for start in range(0, len(messages), _ENCODE_AT_ONCE):
        chats = [[{"role": "user", "content": text}] for text in messages[start : start + _ENCODE_AT_ONCE]]
        texts = _rendered(model_path, chats, date, source, answer_follows=True)
        # The template writes the special tokens itself; the tokenizer would add BOS a second time.
        encoded += [tuple(ids) for ids in tok(texts, add_special_tokens=False)["input_ids"]]  # type: ignore[arg-type]
    _refuse_invented(model_path, messages, encoded, source)
    return encoded


def _refuse_invented(
    model_path: str, messages: Sequence[str], encoded: Sequence[Sequence[int]], source: object
) -> None:
    tok = tokenizer(model_path)
    invented = tokenizer_folder.invented(tok)
    hits = [(text, min(own)) for text, ids in zip(messages, encoded, strict=True) if (own := {*invented} & {*ids})]
    if hits:
        (text, token_id), repair = hits[0], "repair the chat template, or bos_token and its like in"
        if invented[token_id] in text:
            repair = f"the question {text!r:.100} holds its text: take it out there, or the token out of"
        raise TokenizerError(
            f"{source}: {len(hits)} of {len(encoded)} prompts hold {_named(tok, token_id)}, a token that a setting of "
            f"{model_path} names but no file of its tokenizer has: the model never learnt it; {repair} "
            "tokenizer_config.json"
        )


def unknown_in(
    model_path: str, messages: Sequence[str], encoded: Sequence[Sequence[int]], date: str | None, source: object
) -> list[int]:
    """Return the indices of messages that hold what the tokenizer has no token for; `encoded` is as `encode` has it.

    One that holds the unknown token's own text is none of them, whoever wrote it there.
    """
    tok = tokenizer(model_path)
    hits = [i for i, ids in enumerate(encoded) if tok.unk_token_id in ids]
    if not hits:
        return []
    chats = [[{"role": "user", "content": messages[i]}] for i in hits]
    texts = _rendered(model_path, chats, date, source, answer_follows=True)
    return [i for i, text in zip(hits, texts, strict=True) if str(tok.unk_token) not in text]


def names_the_day(model_path: str) -> bool:
    """Whether the chat template asks for the time."""
    return "strftime_now" in tokenizer(model_path).get_chat_template()


def end_of_turn(model_path: str, date: str | None) -> int | None:
    """Return the control token that the template writes behind an answer; None where it writes none.

    None too where the template can't format an answer, or changes its text. Raises TokenizerError without a `date`
    that the template asks for.
    """
    chat = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    asked = _rendered(model_path, [chat[:1]], date, "a question", answer_follows=True)[0]
    try:
        whole = _rendered(model_path, [chat], date, "an answer", answer_follows=False)[0]
    except TokenizerError:
        return None
    before, _, behind = whole.rpartition(_ANSWER)
    if not before or behind == asked.rpartition(_QUESTION)[2]:  # the latter begins an answer, it ends none
        return None
    control = set(control_tokens(model_path).values())
    ids = tokenizer(model_path)(behind, add_special_tokens=False)["input_ids"]
    return next((token_id for token_id in ids if token_id in control), None)  # type: ignore[misc, return-value]


def unstopped_turn(model_path: str, date: str | None) -> str | None:
    """Return in words that the token which ends a turn in the template ends no response; None where it does."""
    end, stops, tok = end_of_turn(model_path, date), stop_token_ids(model_path), tokenizer(model_path)
    if end is None or end in stops:
        return None
    return (
        f"model.path: the chat template of {model_path} ends a turn with {_named(tok, end)}, but a response ends only "
        f"at {', '.join(_named(tok, stop) for stop in stops)}: after its answer it may go on to "
        "sampling.max_response_tokens. To end it there, set eos_token_id in the folder's generation_config.json to "
        f"{[*stops, end]} before stage 1"
    )


def unbegun_prompt(model_path: str, date: str | None) -> str | None:
    """Return in words that prompts lack the BOS with which the tokenizer begins a text; None where they have it.

    None too where neither the tokenizer begins one with it nor its settings say that it does.
    """
    tok = tokenizer(model_path)
    if _adds_bos(tok):
        why = f"the tokenizer of {model_path} begins every text with {tok.bos_token!r}"
    elif tok.bos_token_id is not None and tokenizer_folder.settings(model_path).get("add_bos_token"):
        why = (
            f"add_bos_token in tokenizer_config.json of {model_path} says that texts begin with {tok.bos_token!r}, "
            "which its tokenizer.json does not do"
        )
    else:
        return None
    if encode(model_path, [_QUESTION], date, "a question")[0][:1] == (tok.bos_token_id,):
        return None
    return (
        f"model.path: {why}, but the chat template does not write it, so prompts lack it. To have them as the model "
        f"was trained on, write {_BOS} at the beginning of {_template_place(model_path)} before stage 1; "
        f"{_BOS}{_TEXT} asks with the text of a question alone"
    )


def unbegun_answer(model_path: str, date: str | None) -> str | None:
    """Return in words that prompts lack what the template writes before an answer; None where they have it.

    None too where the template writes nothing there, can't format an answer, or changes its text.
    """
    chat = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    asked = _rendered(model_path, [chat[:1]], date, "a question", answer_follows=True)[0]
    try:
        bare, whole = _rendered(model_path, [chat[:1], chat], date, "an answer", answer_follows=False)
    except TokenizerError:
        return None
    header, answer, _ = whole.removeprefix(asked).partition(_ANSWER)
    if asked != bare or not whole.startswith(asked) or not answer or not header.strip():
        return None
    return (
        f"model.path: the chat template of {model_path} takes no notice of add_generation_prompt: it writes "
        f"{header!r} before an answer, and prompts end without it, so that the model has to write it. To begin the "
        f"answer, let {_template_place(model_path)} write it where add_generation_prompt is true, before stage 1"
    )


def without_its_file(model_path: str) -> str | None:
    """Return in words that transformers makes the tokens by a class of its own; None where tokenizer.json has them."""
    tok = tokenizer(model_path)
    if tokenizer_folder.file_of(model_path).exists():
        return None
    return (
        f"model.path: {model_path} has no tokenizer.json: its tokens are what transformers' {type(tok).__name__} makes "
        "of the other files, and another version of transformers may make others; add the model's tokenizer.json"
    )


def read_otherwise(model_path: str, messages: Sequence[str], date: str | None) -> str | None:
    """Return in words how many of the first messages transformers' AutoTokenizer reads otherwise; None without any.

    It goes by the class that tokenizer_config.json names, and so do those who serve an export with it.
    """
    tok, messages = tokenizer(model_path), messages[:_COMPARED]
    ours = [list(ids) for ids in encode(model_path, messages, date, "a prompt")]
    chats = [[{"role": "user", "content": text}] for text in messages]
    settings = {"strftime_now": _clock(model_path, date)} if names_the_day(model_path) else {}
    try:
        other: Any = tokenizer_folder.by_class(model_path)
        theirs = other.apply_chat_template(chats, add_generation_prompt=True, return_dict=False, **settings)
        texts = [(tok.decode(ids), other.decode(ids)) for ids in ours]
    except Exception as error:
        return f"model.path: transformers' AutoTokenizer can't read the tokenizer of {model_path}: {error!r:.500}"
    count = sum(ids != there or text != its for ids, there, (text, its) in zip(ours, theirs, texts, strict=True))
    if not count:
        return None
    return (
        f"model.path: transformers' AutoTokenizer makes a {type(other).__name__} of {model_path}, which reads {count} "
        f"of the first {len(ours)} prompts otherwise than this run, and so would who serves its export: there, let "
        "tokenizer_class in tokenizer_config.json be PreTrainedTokenizerFast, or load it with that class"
    )


def _template_place(model_path: str) -> str:
    """Return in words where a model's chat template stands: a file of its own takes the place of a setting."""
    has_file = (Path(model_path) / "chat_template.jinja").exists()
    return "the folder's chat_template.jinja" if has_file else "chat_template in the folder's tokenizer_config.json"


def detokenizer(model_path: str) -> Callable[[Sequence[int]], str]:
    """Return the function from response tokens to the text that the reward reads: all but the token that ended it.

    Special tokens stay: <answer> or <think> may be some. Raises TokenizerError.
    """
    tok, stops = tokenizer(model_path), frozenset(stop_token_ids(model_path))

    def text(token_ids: Sequence[int]) -> str:
        ended = len(token_ids) > 0 and token_ids[-1] in stops
        return str(tok.decode(list(token_ids[: len(token_ids) - ended]), skip_special_tokens=False))

    return text


def _clock(model_path: str, date: str | None) -> Callable[[str], str]:
    """The function that a template asks for the time: it says the configured day."""
    day = None if date is None else datetime.datetime.fromisoformat(date)

    def strftime_now(form: str) -> str:
        if day is None:
            raise TokenizerError(
                f"data.date: the chat template of {model_path} writes the time into each prompt (strftime_now), so "
                "tomorrow's prompts would be others than today's; set the day that they name, once for the table and "
                f"all runs from it: data.date={datetime.date.today()} for today, the day of its sweep for an earlier "
                "table"
            )
        return day.strftime(form)

    return strftime_now


def _rendered(
    model_path: str, chats: Sequence[Chat], date: str | None, source: object, *, answer_follows: bool
) -> list[str]:
    try:
        return list(
            tokenizer(model_path).apply_chat_template(
                list(chats),
                tokenize=False,
                add_generation_prompt=answer_follows,
                strftime_now=_clock(model_path, date),
            )  # type: ignore[arg-type]
        )
    except TokenizerError:
        raise
    except Exception as error:  # a template is a program of its own, and may raise anything
        raise TokenizerError(
            f"the chat template of {model_path} can't format {source}: {error}; repair the template"
        ) from error


def _named(tok: "PreTrainedTokenizerBase", token_id: int) -> str:
    text = tok.convert_ids_to_tokens(token_id)  # None: the tokenizer has no such token either
    return str(token_id) if text is None else f"{text!r} ({token_id})"


def _token_id(value: Any, file_name: str) -> int:
    if type(value) is not int or value < 0:
        raise TokenizerError(f"eos_token_id: expected a token id, got {value!r}; repair {file_name}")
    return value
