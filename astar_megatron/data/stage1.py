"""The stage-1 data sets that the authors of A*PO published, for a V* table (arXiv 2505.20686, official code).

Columns: prompt (a chat of one user message), reward_model.ground_truth, and pairs response_i, eval_i (the reward by the
official code's rule), numbered from 0. A row may have fewer pairs than another (null); one that lacks half of a pair is
a problem: the official code would take V* = 0.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from astar_megatron.data import chat
from astar_megatron.data.rows import Pair, Problems, PromptError, Row, is_text
from astar_megatron.types import Prompt, Rollout

_MOST_SAMPLES = 100_000  # a prompt, as sweep.num_samples has it
_COLUMN = re.compile(r"(response|eval)_([0-9]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage1Row:
    """A prompt with N responses of the reference and what the official code rewarded them with."""

    pair: Pair
    samples: tuple[int, ...]  # [N], the i of response_i
    responses: tuple[str, ...]
    evals: tuple[float, ...]


def stage1_rows(rows: list[Row], problems: Problems) -> list[Stage1Row]:
    """Return the rows of a published stage-1 data set; what lacks a part goes to `problems`. Raises PromptError."""
    columns = dict.fromkeys(name for row in rows for name in row.fields)
    numbers = sorted({int(match[2]) for name in columns if (match := _COLUMN.fullmatch(name))})
    if odd := [name for name in columns if (match := _COLUMN.fullmatch(name)) and str(int(match[2])) != match[2]]:
        raise PromptError(f"the column {odd[0]} has zeros before its number, expected response_0, response_1, ...")
    if numbers and numbers[-1] >= _MOST_SAMPLES:
        raise PromptError(
            f"the column response_{numbers[-1]} is beyond response_{_MOST_SAMPLES - 1}; number them from 0"
        )
    if not any({f"response_{i}", f"eval_{i}"} <= columns.keys() for i in numbers):
        raise PromptError(
            "no stage-1 data set: expected columns response_0, eval_0, response_1, ...; "
            f"it has {', '.join(columns) or 'nothing'}"
        )
    parsed = []
    for row in rows:
        try:
            parsed.append(_read(row, numbers))
        except PromptError:  # the file is damaged
            raise
        except ValueError as error:
            problems.add(row.where, str(error))
    return parsed


def without_suffix(rows: Sequence[Stage1Row], suffix: str, source: str) -> list[Stage1Row]:
    """Return the rows with their questions alone; published ones have the suffix, which a run adds. PromptError."""
    bare = [replace(row, pair=replace(row.pair, question=row.pair.question.removesuffix(suffix))) for row in rows]
    pairs = [(row.pair, short.pair.question) for row, short in zip(rows, bare, strict=True)]
    if other := [pair for pair, question in pairs if pair.question != question + suffix or not question.strip()]:
        raise PromptError(
            f"data.suffix: {len(other)} of {len(rows)} prompts of {source} are no question with {suffix!r} behind it; "
            f"the first, {other[0].where}, ends with {other[0].question[-80:]!r}: set it to what all end with"
        )
    return bare


def _read(row: Row, numbers: list[int]) -> Stage1Row:
    chat = row.fields.get("prompt")
    if not isinstance(chat, list) or [_get(turn, "role") for turn in chat] != ["user"]:
        raise ValueError(f"prompt is {chat!r:.200}, expected a chat of one user message")
    question, answer = _get(chat[0], "content"), _get(row.fields.get("reward_model"), "ground_truth")
    if not isinstance(question, str) or not question.strip() or not is_text(question):
        raise ValueError(f"the user message is {question!r:.200}, expected text")
    if not isinstance(answer, str) or not answer.strip() or not is_text(answer):
        raise ValueError(f"reward_model.ground_truth is {answer!r:.80}, expected text")
    pairs = {i: pair for i in numbers if (pair := _response(row, i)) is not None}
    if not pairs:
        raise ValueError("it has no response_i with its eval_i; expected at least one such pair")
    return Stage1Row(
        pair=Pair(where=row.where, question=question, answer=answer),
        samples=tuple(pairs),
        responses=tuple(response for response, _ in pairs.values()),
        evals=tuple(value for _, value in pairs.values()),
    )


def _response(row: Row, i: int) -> tuple[str, float] | None:
    """response_i and eval_i; None where the row has neither."""
    response, value = row.fields.get(f"response_{i}"), row.fields.get(f"eval_{i}")
    if response is None and value is None:
        return None
    if not isinstance(response, str) or not is_text(response):
        raise ValueError(f"response_{i} is {response!r:.80}, expected text")
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"eval_{i} is {value!r:.80}, expected a finite number")
    return response, float(value)


def _get(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, Mapping) else None


def rollouts_of(
    prompt: Prompt, row: Stage1Row, model_path: str, max_response_tokens: int, stops: tuple[int, ...]
) -> list[Rollout]:
    """The responses as the model of `model_path` would have drawn them; what the data set does not say is NaN or 0."""
    tok, rollouts = chat.tokenizer(model_path), []
    ends = {str(tok.convert_ids_to_tokens(stop)): stop for stop in stops}
    for sample, response in zip(row.samples, row.responses, strict=True):
        end = next((end for end in ends if response.endswith(end)), str(tok.eos_token))
        text = response.removesuffix(end)
        token_ids = tuple(tok(text, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]
        truncated = len(token_ids) >= max_response_tokens
        token_ids = token_ids if truncated else (*token_ids, ends[end])
        rollouts.append(Rollout.given(prompt, sample, token_ids, text, truncated=truncated))
    return rollouts


def check_ends(places: Sequence[str], drawn: Sequence[Rollout], stops: tuple[int, ...], source: str) -> None:
    """Raise PromptError where a response goes on behind a stop token; `places` says in words where each stands."""
    bodies = [rollout.token_ids if rollout.truncated else rollout.token_ids[:-1] for rollout in drawn]
    if beyond := [i for i, body in enumerate(bodies) if not set(stops).isdisjoint(body)]:
        first = beyond[0]
        place = min(bodies[first].index(stop) for stop in stops if stop in bodies[first])
        raise PromptError(
            f"{source}: {len(beyond)} of {len(drawn)} responses go on behind a stop token, so this run could not have "
            f"drawn them; the first, {places[first]}, response_{drawn[first].sample}, has one at token {place + 1} of "
            f"{len(bodies[first])}: cut it there or leave it out"
        )
