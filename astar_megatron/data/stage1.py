"""The stage-1 data sets that the authors of A*PO published, for a V* table (arXiv 2505.20686, official code).

Columns: prompt (a chat of one user message), reward_model.ground_truth, response_0..N-1 and eval_0..N-1 (the reward by
the official code's rule). A row that lacks one of them is a problem: the official code would take V* = 0.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from astar_megatron.data.rows import Pair, Problems, PromptError, Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage1Row:
    """A prompt with N responses of the reference and what the official code rewarded them with."""

    pair: Pair
    responses: tuple[str, ...]
    evals: tuple[float, ...]


def stage1_rows(rows: list[Row], problems: Problems) -> list[Stage1Row]:
    """Return the rows of a published stage-1 data set; what lacks a part goes to `problems`. Raises PromptError."""
    count = 0
    while rows and f"response_{count}" in rows[0].fields and f"eval_{count}" in rows[0].fields:
        count += 1
    if not count:
        columns = ", ".join(rows[0].fields) if rows else "nothing"
        raise PromptError(
            f"no stage-1 data set: expected columns response_0, eval_0, response_1, ...; it has {columns}"
        )
    found = []
    for row in rows:
        try:
            found.append(_read(row, count))
        except ValueError as error:
            problems.add(row.where, str(error))
    return found


def _read(row: Row, count: int) -> Stage1Row:
    chat = row.fields.get("prompt")
    if not isinstance(chat, list) or [_get(turn, "role") for turn in chat] != ["user"]:
        raise ValueError(f"prompt is {chat!r:.200}, expected a chat of one user message")
    question, answer = _get(chat[0], "content"), _get(row.fields.get("reward_model"), "ground_truth")
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"the user message is {question!r}, expected text")
    if not isinstance(answer, str) or not answer.strip():
        raise ValueError(f"reward_model.ground_truth is {answer!r:.80}, expected text")
    responses = [row.fields.get(f"response_{i}") for i in range(count)]
    evals = [row.fields.get(f"eval_{i}") for i in range(count)]
    for i, (response, value) in enumerate(zip(responses, evals, strict=True)):
        if not isinstance(response, str):
            raise ValueError(f"response_{i} is {response!r:.80}, expected text")
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"eval_{i} is {value!r:.80}, expected a finite number")
    return Stage1Row(
        pair=Pair(where=row.where, question=question, answer=answer),
        responses=tuple(str(response) for response in responses),
        evals=tuple(float(value or 0.0) for value in evals),
    )


def _get(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, Mapping) else None
