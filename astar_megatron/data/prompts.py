"""Prompts: a JSONL file through the model's chat template, and the order in which training takes them.

A prompt is what the model reads (token ids) and what the reward compares with (answer); its uid is the digest of
both, so the same question has the same uid in the sweep, in training and in every later run. Nothing is cut or
dropped in silence: exact duplicates, and prompts over the limit where the configuration drops them, are counted in the
log, everything else that is wrong is refused with its count. Leaves out: several turns, images.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from astar_megatron.config import DataConfig
from astar_megatron.data import chat
from astar_megatron.data.nested import refuse_nested
from astar_megatron.data.rows import Pair, Problems, PromptError, answer_field, pairs_of, read_rows, without_duplicates
from astar_megatron.data.sources import RowSource
from astar_megatron.types import Prompt
from conversion.folders import first_few

_LOG = logging.getLogger(__name__)


def read_prompts(cfg: DataConfig, model_path: str, path: str | None = None) -> list[Prompt]:
    """Return the prompts of the file `path` (none: `cfg.path`) in file order, as the model's template has them.

    The user message is the prompt field + `cfg.suffix`. Exact duplicates are kept once. Raises PromptError (file, JSON,
    UTF-8, fields, length, one prompt with two answers) and TokenizerError.
    """
    source = Path(path or cfg.path)
    problems = Problems(source)
    rows = read_rows(source, problems)
    pairs = pairs_of(
        rows,
        cfg.prompt_field,
        answer_field(cfg.answer_field, "set data.answer_field"),
        problems,
        remedy="set data.prompt_field",
    )
    if not pairs:
        refuse_nested(rows, cfg.prompt_field, cfg.answer_field, RowSource(str(source)))
    problems.refuse(len(pairs) + problems.count)
    return list(usable_prompts(pairs, cfg, model_path, source).values())


def usable_prompts(pairs: Sequence[Pair], cfg: DataConfig, model_path: str, source: object) -> dict[int, Prompt]:
    """Return the prompts of `pairs` by their index, as `read_prompts` has them. Raises as it does."""
    problems = Problems(source)
    prompts = make_prompts(pairs, cfg.suffix, cfg.date, model_path, source)
    say_control_tokens(pairs, model_path, source)
    say_unknown_tokens(pairs, prompts, cfg.date, model_path, source)
    first = without_duplicates(pairs, [prompt.token_ids for prompt in prompts], problems)
    problems.refuse(len(pairs))
    if len(first) < len(pairs):
        _LOG.warning("%s: %d exact duplicates of %d prompts dropped", source, len(pairs) - len(first), len(pairs))
    return _within_limit(source, pairs, {i: prompts[i] for i in first}, cfg)


def make_prompts(pairs: Sequence[Pair], suffix: str, date: str | None, model_path: str, source: object) -> list[Prompt]:
    """Return a prompt of each pair in the model's chat template, of any length; `date` as in `chat.encode`.

    Raises PromptError, for a token that the model has no row for too, and TokenizerError.
    """
    encoded = chat.encode(model_path, [pair.question + suffix for pair in pairs], date, source)
    if empty := [pair.where for pair, ids in zip(pairs, encoded, strict=True) if not ids]:
        raise PromptError(f"{source}, {empty[0]}: no token is left after the chat template; check the template")
    size = chat.vocab_size(model_path)
    if beyond := [(pair.where, max(ids)) for pair, ids in zip(pairs, encoded, strict=True) if max(ids) >= size]:
        where, token_id = beyond[0]
        raise PromptError(
            f"{source}: {len(beyond)} of {len(pairs)} prompts can't be read by the model; the first, {where}, has "
            f"{chat.no_row(model_path, token_id)}"
        )
    return [
        Prompt(uid=_uid(ids, pair.answer), token_ids=ids, text=pair.question + suffix, answer=pair.answer)
        for pair, ids in zip(pairs, encoded, strict=True)
    ]


def say_control_tokens(pairs: Sequence[Pair], model_path: str, source: object) -> None:
    """Log how many questions hold the text of a control token, which the model reads as that token; the first few."""
    hits = chat.control_tokens_in(model_path, [pair.question for pair in pairs])
    if hits:
        _LOG.warning(
            "%s: %d of %d questions hold the text of a control token, which the model reads as that token: %s; "
            "write them otherwise unless that is meant",
            source,
            len(hits),
            len(pairs),
            first_few([f"{pairs[index].where} {token!r}" for index, token in hits]),
        )


def say_unknown_tokens(
    pairs: Sequence[Pair], prompts: Sequence[Prompt], date: str | None, model_path: str, source: object
) -> None:
    """Log how many prompts hold what the tokenizer has no token for, which the model can't read; the first few."""
    encoded = [prompt.token_ids for prompt in prompts]
    hits = chat.unknown_in(model_path, [prompt.text for prompt in prompts], encoded, date, source)
    if hits:
        _LOG.warning(
            "%s: %d of %d prompts hold text that the tokenizer has no token for, which the model reads as %r: %s; "
            "check that the tokenizer in %s is the model's own",
            source,
            len(hits),
            len(prompts),
            chat.tokenizer(model_path).unk_token,
            first_few([pairs[index].where for index in hits]),
            model_path,
        )


def digest_of_prompts(uids: Sequence[str], weights: Mapping[str, float]) -> str:
    """Return a digest of prompts and of the weights that they have."""
    weighted = [f"{uid} {weight!r}" for uid, weight in sorted(weights.items())]
    return hashlib.sha256("\n".join([*uids, *weighted]).encode()).hexdigest()


def check_same_prompts(cursor: Mapping[str, Any], seed: int, digest: str) -> None:
    """Raise PromptError where a saved `cursor` is of another seed, or of prompts with another digest."""
    if cursor.get("seed") != seed:
        raise PromptError(
            f"seed: {seed}, but the checkpoint's order of prompts is of {cursor.get('seed')!r}; set it as it was, or "
            "choose a new run_dir"
        )
    if cursor.get("prompts") != digest:
        raise PromptError(
            "data.path: its prompts are not those that the checkpoint was trained on: some were added, changed or "
            "removed, or another filter leaves out others; give it prompts and filter as they were, or choose a new "
            "run_dir"
        )


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
        an_epoch = sum(min(1.0, self._weights.get(prompt.uid, 1.0)) for prompt in prompts)
        if an_epoch < 1 - 1e-9:  # else `take` would go through epoch after epoch that has none
            raise PromptError(
                f"PromptStream: the weights of {len(prompts)} prompts add up to {an_epoch:g}, less than one prompt an "
                "epoch; raise filter.all_wrong, filter.all_right or filter.wide"
            )
        self._digest = digest_of_prompts([prompt.uid for prompt in self._prompts], self._weights)
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
        check_same_prompts(state, self._seed, self._digest)
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


def _within_limit(
    source: object, pairs: Sequence[Pair], prompts: dict[int, Prompt], cfg: DataConfig
) -> dict[int, Prompt]:
    lengths = {i: len(prompt.token_ids) for i, prompt in prompts.items()}
    longest, limit = max(lengths, key=lengths.__getitem__), cfg.max_prompt_tokens
    count = sum(length > limit for length in lengths.values())
    if count == 0:
        return prompts
    excess = (
        f"{source}: {count} of {len(prompts)} prompts exceed data.max_prompt_tokens = {limit}; the longest "
        f"({pairs[longest].where}) has {lengths[longest]}"
    )
    if cfg.long_prompts == "refuse" or count == len(prompts):
        raise PromptError(
            f"{excess}; raise data.max_prompt_tokens to {lengths[longest]}, or set data.long_prompts=drop"
        )
    _LOG.warning("%s; dropped, as data.long_prompts says", excess)
    return {i: prompt for i, prompt in prompts.items() if lengths[i] <= limit}


def _uid(token_ids: tuple[int, ...], answer: str) -> str:
    digest = hashlib.sha256(len(token_ids).to_bytes(8, "little"))
    digest.update(b"".join(token.to_bytes(8, "little") for token in token_ids))
    digest.update(answer.encode("utf-8"))
    return digest.hexdigest()[:32]
