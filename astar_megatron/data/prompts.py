"""Prompts: a JSONL file through the model's chat template, and the order in which training takes them.

A prompt is what the model reads (token ids) and what the reward compares with (answer); its uid is the digest of
both, so the same question has the same uid in the sweep, in training and in every later run. Nothing is cut or
dropped in silence: exact duplicates are counted in the log, everything else that is wrong is refused.
Leaves out: other sources than JSONL, several turns, images.
"""

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from astar_megatron.config import DataConfig
from astar_megatron.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOG = logging.getLogger(__name__)
_ENCODE_AT_ONCE = 4096  # texts a tokeniser call


class PromptError(ValueError):
    """A prompt file that can't be used; the message names the file and the line."""


class TokenizerError(ValueError):
    """A model folder without a tokenizer that can format a chat and end a response."""


def read_prompts(cfg: DataConfig, model_path: str, path: str | None = None) -> list[Prompt]:
    """Return the prompts of the JSONL file `path` (none: `cfg.path`) in file order, as the model's template has them.

    The user message is the prompt field + `cfg.suffix`. Exact duplicates are kept once. Raises PromptError (file, JSON,
    UTF-8, fields, length, one prompt with two answers) and TokenizerError.
    """
    source = Path(path or cfg.path)
    rows = _read_rows(source, cfg)
    encoded = _encode(tokenizer(model_path), [question + cfg.suffix for _, question, _ in rows], source)
    _check_lengths(source, [line for line, _, _ in rows], encoded, cfg.max_prompt_tokens)
    found: dict[tuple[int, ...], tuple[int, Prompt]] = {}  # prompt tokens -> line, prompt
    for (line, question, answer), token_ids in zip(rows, encoded, strict=True):
        prompt = Prompt(uid=_uid(token_ids, answer), token_ids=token_ids, text=question + cfg.suffix, answer=answer)
        first_line, first = found.setdefault(token_ids, (line, prompt))
        if first.answer != answer:
            raise PromptError(
                f"{source}: lines {first_line} and {line} are one prompt with two answers, {first.answer!r:.200} and "
                f"{answer!r:.200}; keep the right one ({question!r:.200})"
            )
    if len(found) < len(rows):
        _LOG.warning("%s: %d exact duplicates of %d prompts dropped", source, len(rows) - len(found), len(rows))
    return [prompt for _, prompt in found.values()]


@functools.lru_cache(maxsize=4)
def tokenizer(model_path: str) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of an HF folder, from local files only; kept for the process. Raises TokenizerError."""
    from transformers import AutoTokenizer  # here, because the import takes seconds

    if not Path(model_path).is_dir():
        raise TokenizerError(f"model.path: no such folder: {model_path}; give a Hugging Face folder on this machine")
    try:
        found = AutoTokenizer.from_pretrained(model_path, local_files_only=True, use_fast=True)
    except Exception as error:  # for a damaged file transformers raises KeyError, its Rust part bare Exceptions
        raise TokenizerError(
            f"model.path: {model_path} has no tokenizer that transformers can load: {error!r:.500}; "
            "add tokenizer.json and tokenizer_config.json of the model"
        ) from error
    if not found.chat_template:
        raise TokenizerError(
            f"model.path: the tokenizer of {model_path} has no chat template; add chat_template.jinja to the folder"
        )
    if found.eos_token_id is None:
        raise TokenizerError(
            f"model.path: the tokenizer of {model_path} has no EOS token, so no response could end; "
            "set eos_token in tokenizer_config.json"
        )
    return found


def stop_token_ids(model_path: str) -> tuple[int, ...]:
    """Return the ids that end a response: the tokenizer's EOS, then those of generation_config.json that differ."""
    ids = [_token_id(tokenizer(model_path).eos_token_id)]
    file = Path(model_path) / "generation_config.json"
    if file.is_file():
        try:
            more = json.loads(file.read_bytes()).get("eos_token_id")
        except (OSError, ValueError, AttributeError) as error:
            raise TokenizerError(f"{file}: not readable as a JSON object: {error}; repair or delete it") from error
        ids += [_token_id(one) for one in (more if isinstance(more, list) else [more]) if one is not None]
    return tuple(dict.fromkeys(ids))


class PromptStream:
    """An endless, seeded order of prompts: each epoch a new permutation, each prompt exactly once an epoch.

    Batches may cross epochs; one larger than the prompt set spans several. The order depends on `seed`, the epoch and
    the set of prompts alone (they are sorted by a digest of these), not on the file's order or a library's generator.
    A prompt of a weight below 1 is in that share of the epochs, by chance (data/filters.py).
    """

    def __init__(
        self, prompts: Sequence[Prompt], batch_size: int, seed: int, weights: Mapping[str, float] | None = None
    ) -> None:
        if not prompts or batch_size < 1:
            raise PromptError(f"PromptStream: expected prompts and a batch size, got {len(prompts)} and {batch_size}")
        if len({prompt.uid for prompt in prompts}) != len(prompts):
            raise PromptError("PromptStream: some prompts have the same uid; read_prompts drops exact duplicates")
        self._prompts = tuple(sorted(prompts, key=lambda prompt: prompt.uid))
        self._batch_size = batch_size
        self._seed, self._weights = seed, weights or {}
        if not any(self._weights.get(prompt.uid, 1.0) for prompt in prompts):
            raise PromptError("PromptStream: every prompt has weight 0; loosen the filter")
        listed = [prompt.uid for prompt in self._prompts]
        listed += [f"{uid} {weight!r}" for uid, weight in sorted(self._weights.items())]
        self._digest = hashlib.sha256("\n".join(listed).encode()).hexdigest()
        self._epoch, self._taken = 0, 0
        self._order = self._permutation(0)

    def take(self) -> list[Prompt]:
        """Return the next `batch_size` prompts."""
        batch: list[Prompt] = []
        while len(batch) < self._batch_size:
            if self._taken == len(self._order):
                self._epoch, self._taken = self._epoch + 1, 0
                self._order = self._permutation(self._epoch)
            until = min(self._taken + self._batch_size - len(batch), len(self._order))
            batch += [self._prompts[i] for i in self._order[self._taken : until]]
            self._taken = until
        return batch

    def state(self) -> dict[str, int | str]:
        """Return the cursor, ready for JSON: seed, epoch, prompts taken of it, digest of the prompt set."""
        return {"seed": self._seed, "epoch": self._epoch, "taken": self._taken, "prompts": self._digest}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken; the batch size may differ. Raises PromptError for other prompts or seed."""
        expected = {"seed": self._seed, "prompts": self._digest}
        for name, mine in expected.items():
            if state.get(name) != mine:
                raise PromptError(
                    f"PromptStream: the saved cursor has {name} {state.get(name)!r}, this run {mine!r}; "
                    "continue with the data and seed it was saved with, or start a new run_dir"
                )
        epoch, taken = state.get("epoch"), state.get("taken")
        if (
            not isinstance(epoch, int)
            or not isinstance(taken, int)
            or epoch < 0
            or not 0 <= taken <= len(order := self._permutation(epoch))
        ):
            raise PromptError(f"PromptStream: expected a cursor of whole numbers in range, got {dict(state)!r}")
        self._epoch, self._taken, self._order = epoch, taken, order

    def _permutation(self, epoch: int) -> list[int]:
        prefix = f"{self._seed}:{epoch}:"
        keys = [hashlib.blake2b((prefix + prompt.uid).encode(), digest_size=16).digest() for prompt in self._prompts]
        return sorted(filter(self._drawn(prefix), range(len(keys))), key=keys.__getitem__)

    def _drawn(self, prefix: str) -> Callable[[int], bool]:
        """Whether an epoch has a prompt: by a digest of its own, which says nothing of its place."""

        def drawn(i: int) -> bool:
            uid = self._prompts[i].uid
            weight = self._weights.get(uid, 1.0)
            digest = hashlib.blake2b(f"{prefix}weight:{uid}".encode(), digest_size=8).digest() if weight < 1 else b""
            return int.from_bytes(digest, "big") < weight * 2**64

        return drawn


def _read_rows(source: Path, cfg: DataConfig) -> list[tuple[int, str, str]]:
    """Line number, question and answer of each line that is not blank."""
    try:
        data = source.read_bytes()
    except OSError as error:
        reason = f"can't read the prompts: {error.strerror}"
        raise PromptError(f"{source}: {reason}; check data.path and data.eval_path") from error
    rows = []
    for line, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            row = json.loads(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise PromptError(f"{source}, line {line}: not UTF-8 ({error}); convert the file to UTF-8") from None
        except ValueError as error:
            raise PromptError(f"{source}, line {line}: not JSON ({error}); expected one object a line") from None
        if not isinstance(row, dict):
            raise PromptError(f"{source}, line {line}: expected a JSON object, got {type(row).__name__}")
        question = _field(row, cfg.prompt_field, f"{source}, line {line}", "data.prompt_field")
        rows.append((line, question, _field(row, cfg.answer_field, f"{source}, line {line}", "data.answer_field")))
    if not rows:
        raise PromptError(f"{source}: holds no prompt; expected one JSON object a line")
    return rows


def _field(row: dict[str, Any], name: str, where: str, key: str) -> str:
    if name not in row:
        raise PromptError(f"{where}: no field {name!r}, only {', '.join(map(repr, row)) or 'none'}; set {key}")
    value = row[name]
    if isinstance(value, int | float) and not isinstance(value, bool) and key == "data.answer_field":
        value = str(value)  # a JSON number is as good an answer as its text
    if not isinstance(value, str):
        raise PromptError(f"{where}: field {name!r} is {type(value).__name__}, expected text; repair it or set {key}")
    if not value.strip():
        raise PromptError(f"{where}: field {name!r} is empty; fill it or remove the line")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise PromptError(f"{where}: field {name!r} holds half a surrogate pair, which is no text; repair it") from None
    return value


def _encode(tok: "PreTrainedTokenizerBase", messages: Sequence[str], source: Path) -> list[tuple[int, ...]]:
    """The token ids of one user message each, formatted by the chat template, up to where the answer begins."""
    from jinja2 import TemplateError

    encoded: list[tuple[int, ...]] = []
    for start in range(0, len(messages), _ENCODE_AT_ONCE):
        chats = [[{"role": "user", "content": text}] for text in messages[start : start + _ENCODE_AT_ONCE]]
        try:
            texts = tok.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        except (TemplateError, ValueError, TypeError) as error:
            raise TokenizerError(f"the chat template can't format {source}: {error}; repair the template") from error
        # The template writes the special tokens itself; the tokenizer would add BOS a second time.
        encoded += [tuple(ids) for ids in tok(list(texts), add_special_tokens=False)["input_ids"]]  # type: ignore[arg-type]
    return encoded


def _check_lengths(source: Path, lines: Sequence[int], encoded: Sequence[tuple[int, ...]], limit: int) -> None:
    longest = max(range(len(encoded)), key=lambda i: len(encoded[i]))
    if (tokens := len(encoded[longest])) > limit:
        count = sum(len(ids) > limit for ids in encoded)
        raise PromptError(
            f"{source}: {count} of {len(encoded)} prompts exceed data.max_prompt_tokens = {limit}; the longest "
            f"(line {lines[longest]}) has {tokens}; raise data.max_prompt_tokens to {tokens} or remove the lines"
        )
    if empty := [line for line, ids in zip(lines, encoded, strict=True) if not ids]:
        raise PromptError(f"{source}, line {empty[0]}: no token is left after the chat template; check the template")


def _uid(token_ids: tuple[int, ...], answer: str) -> str:
    digest = hashlib.sha256(len(token_ids).to_bytes(8, "little"))
    digest.update(b"".join(token.to_bytes(8, "little") for token in token_ids))
    digest.update(answer.encode("utf-8"))
    return digest.hexdigest()[:32]


def _token_id(value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise TokenizerError(f"eos_token_id: expected a token id, got {value!r}; repair generation_config.json")
    return value
