"""Writes configs/README.md: what stands there above `MARK` stays, the tables below it are made of RunConfig.

    .venv/bin/python tests/config_page.py

A key's text is the docstring below it in astar_megatron/config.py; `[unit]` at its beginning becomes a column.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeAliasType, get_args, get_origin

from pydantic.fields import FieldInfo

from astar_megatron.config import RunConfig, Section

PAGE = Path(__file__).resolve().parents[1] / "configs" / "README.md"
MARK = "## Every key\n"
_TYPES = {int: "whole number", float: "number", str: "text", bool: "true or false"}
_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def page(text: str) -> str:
    """Return the page with its tables made anew; `text` is the page as it is."""
    above, mark, _ = text.partition(MARK)
    if not mark:
        raise ValueError(f"{PAGE}: expected the heading {MARK.strip()!r}, below which the tables go")
    return above + mark + "".join(f"\n{line}" for line in _sections(RunConfig, "")) + "\n"


def _sections(section: type[Section], prefix: str) -> Iterator[str]:
    """Yield the lines of a section's text and table, then those of the sections inside it."""
    inner = {}
    if prefix:
        yield f"### {prefix.removesuffix('.')}"
        yield ""
    yield " ".join((section.__doc__ or "").split("\n\n")[0].split())
    yield from (line for part in (section.__doc__ or "").split("\n\n")[1:] for line in ("", " ".join(part.split())))
    yield ""
    yield "| key | type | default | unit | meaning |"
    yield "| --- | --- | --- | --- | --- |"
    for name, key in section.model_fields.items():
        if isinstance(key.annotation, type) and issubclass(key.annotation, Section):
            inner[f"{prefix}{name}."] = key.annotation
        else:
            yield _row(prefix + name, key)
    for name, section in inner.items():
        yield ""
        yield from _sections(section, name)


def _row(path: str, key: FieldInfo) -> str:
    unit, meaning = re.fullmatch(r"(?:\[(.+?)\] )?(.+)", " ".join((key.description or "").split())).groups()  # type: ignore[union-attr]
    bounds = [
        f"{sign} {getattr(rule, name):g}"
        for rule in key.metadata
        for name, sign in _BOUNDS.items()
        if hasattr(rule, name)
    ]
    may_be_null = "or null" if type(None) in get_args(key.annotation) else ""
    kind = " ".join(filter(None, [_type(key.annotation), ", ".join(bounds), may_be_null]))
    default = "required" if key.is_required() else f"`{_value(key.default)}`"
    return f"| `{path}` | {kind} | {default} | {unit or ''} | {meaning} |"


def _type(annotation: Any) -> str:
    if isinstance(annotation, TypeAliasType):
        return _type(annotation.__value__)
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) is list:
        return f"list of {_type(get_args(annotation)[0])}"
    if type(None) in get_args(annotation):
        return _type(next(kind for kind in get_args(annotation) if kind is not type(None)))
    return _TYPES[annotation if annotation in _TYPES else get_args(annotation)[0]]


def _value(value: Any) -> str:
    """Return a default as YAML reads it."""
    return re.sub(r"e-0", "e-", json.dumps(value))


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
