"""Rows as verl and TRL write them, a question as chat messages or an answer within an object: what makes lines of them.

They are refused: a system message belongs to the model's template, and several turns are not read.
"""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from astar_megatron.data.rows import PromptError, Row

_OF_VERL = ["reward_model", "ground_truth"]  # where an answer is looked for that has no field of its own
# Of the messages that are no system's there must be one alone, else the loop stops.
_TO_LINES = (
    "import json, sys; from astar_megatron.data.rows import Problems, read_rows, text_of; "
    "rows = read_rows(sys.argv[1], problems := Problems(sys.argv[1])); problems.refuse(len(rows) + problems.count); "
    'print(*[json.dumps({{"question": question, "answer": '
    'text_of(row.fields{within}, {last}, "name another in this command", number=True)}}) '
    'for row in rows for (question,) in [{questions}]], sep="\\n")'
)
_MESSAGES = (
    '[text_of(message, "content", "leave the row out") for message in row.fields[{field}] '
    'if message["role"] != "system"]'
)


def refuse_nested(rows: Sequence[Row], question: str, answer: str, source: str | Path) -> None:
    """Raise PromptError, with the command that makes lines of the rows, where the first has messages or a deep answer.

    `question` and `answer` are the fields that were asked for; with dots ("prompt.0.content") they lead into one.
    """
    if not rows:
        return
    fields = rows[0].fields
    head = question if question in fields else question.partition(".")[0]
    place = next((p for p in ([answer], answer.split("."), _OF_VERL) if _is_answer(_value(fields, p))), [answer])
    if _is_messages(_value(fields, [head])):
        kind = f"field {head!r} is a list of messages, expected text; one message of the user is a question, and "
        kind += "system messages, which this leaves out, are written into the chat template (examples/OWN.md)"
        questions = _MESSAGES.format(field=json.dumps(head))
    elif len(place) > 1 and question in fields:
        kind = f"the answer is in the object {place[0]!r}, expected text in a field of its own"
        questions = f"[row.fields[{json.dumps(question)}]]"
    else:
        return
    *outer, last = map(json.dumps, place)
    code = _TO_LINES.format(within="".join(f"[{name}]" for name in outer), last=last, questions=questions)
    path, remedy = (
        (Path(source).absolute(), "") if Path(source).exists() else (Path("FILE"), "download it, and with its FILE ")
    )
    command = [sys.executable, "-c", code, str(path)]
    lines = shlex.quote(f"{path.with_suffix('')}_lines.jsonl")
    raise PromptError(f"{source}, {rows[0].where}: {kind}; {remedy}convert it: {shlex.join(command)} > {lines}")


def _value(fields: Mapping[str, Any], place: Sequence[str]) -> Any:
    """What lies at a place of a row; None where nothing does, or nothing that can be read."""
    value: Any = fields
    try:
        for name in place:
            value = value[name] if isinstance(value, Mapping) else None
    except (KeyError, ValueError):
        return None
    return value


def _is_answer(value: Any) -> bool:
    return isinstance(value, str | int | float)


def _is_messages(value: Any) -> bool:
    return bool(isinstance(value, list) and value) and all(
        isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in value
    )
