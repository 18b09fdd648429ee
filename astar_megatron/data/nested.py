"""Rows as verl and TRL write them, a question as chat messages or an answer within an object: what makes lines of them.

They are refused: a system message belongs to the model's template, and several turns are not read.
"""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from astar_megatron.data.rows import Problems, PromptError, Row, text_of
from astar_megatron.data.sources import RowSource, rows_of

_OF_VERL = ["reward_model", "ground_truth"]  # where an answer is looked for that is nowhere else
_MESSAGES = (
    "is a list of messages, expected text; one message of the user is a question, and system messages, which this "
    "leaves out, are written into the chat template (examples/OWN.md)"
)


def refuse_nested(rows: Sequence[Row], question: str, answer: str, source: RowSource) -> None:
    """Raise PromptError where rows have messages or a deep answer, with the command that makes lines where one can be.

    `question` and `answer` are the fields that were asked for; with dots ("prompt.0.content") they lead into one.
    """
    refused = ""
    for row in rows:
        head = question if question in row.fields else question.partition(".")[0]
        asked, place = _value(row.fields, [head]), _place(row.fields, answer)
        if _is_messages(asked):
            problem = f"field {head!r} {_MESSAGES}"
            seen = f"at {answer!r}; the fields are {', '.join(map(repr, row.fields))}: name the right ones"
            refused = (
                refused or f"{source.place}, {row.where}: {problem}; no row has that, and a text or a number {seen}"
            )
        elif len(place) > 1 and question in row.fields:
            problem = f"the answer is in the object {place[0]!r}, expected text in a field of its own"
        else:
            continue
        if isinstance(_question(asked), str) and _is_answer(_value(row.fields, place)):
            command = _to_lines(head, place, source)
            raise PromptError(f"{source.place}, {row.where}: {problem}; convert it: {command}")
    if refused:
        raise PromptError(refused)


def print_lines(question: str, place: Sequence[str], source: RowSource) -> None:
    """Print a line of each row, its answer what lies at a `place`.

    What can't be used stands there as it is, for `astar data` or a run to refuse. Raises PromptError as `rows_of` does.
    """
    rows = rows_of(source, problems := Problems(source.place))
    problems.refuse(len(rows) + problems.count)
    lines = [
        {"question": _question(_value(row.fields, [question])), "answer": _answer(_value(row.fields, place))}
        for row in rows
    ]
    print(*map(json.dumps, lines), sep="\n")


def _to_lines(question: str, place: Sequence[str], source: RowSource) -> str:
    """The command that writes the rows as lines beside them; those of the hub, where it is run."""
    path = Path(source.place).absolute() if Path(source.place).exists() else Path(source.place)
    arguments = (question, place, replace(source, place=str(path)))
    code = f"from {__name__} import RowSource, print_lines; print_lines{arguments!r}"
    of_which = "".join(f"_{name}" for name in (source.subset, source.split) if name)
    beside = path.with_suffix("") if path.is_file() else path if path.is_dir() else path.name
    return f"{shlex.join([sys.executable, '-c', code])} > {shlex.quote(f'{beside}{of_which}_lines.jsonl')}"


def _place(fields: Mapping[str, Any], answer: str) -> list[str]:
    """Where a row has the answer that was asked for; verl's place where it has none, or the object around that."""
    places = (_OF_VERL, [answer]) if answer == _OF_VERL[0] else ([answer], answer.split("."), _OF_VERL)
    for *outer, last in places:
        if isinstance(around := _value(fields, outer), Mapping) and last in around:
            return [*outer, last]
    return [answer]


def _value(fields: Mapping[str, Any], place: Sequence[str]) -> Any:
    """What lies at a place of a row; None where nothing does, or nothing that can be read."""
    value: Any = fields
    try:
        for name in place:
            value = value[name] if isinstance(value, Mapping) else None
    except (KeyError, ValueError):
        return None
    return value


def _question(asked: Any) -> Any:
    """The content of the user's message, where all others are the system's; anything else as it is."""
    if _is_messages(asked):
        others = [message for message in asked if message["role"] != "system"]
        return others[0]["content"] if [message["role"] for message in others] == ["user"] else asked
    return asked


def _answer(value: Any) -> Any:
    """A number as text, with all its digits; anything else as it is."""
    try:
        return text_of({"answer": value}, "answer", "", number=True)
    except ValueError:
        return value


def _is_answer(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _is_messages(value: Any) -> bool:
    return bool(isinstance(value, list) and value) and all(
        isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in value
    )
