"""Typed reading of a config.json: a field holds what it is read as, or is refused by name; JSON has any type anywhere.

`where` stands before the field's name in a message: "rope_parameters: ".
"""

from collections.abc import Mapping
from typing import Any

_LARGEST = 2**40  # of one size: no memory has as many rows or columns, so the file is damaged


class UnsupportedModelError(ValueError):
    """A configuration says something that is not modelled; the message names the key, its value and what is known."""


def count(config: Mapping[str, Any], key: str, where: str = "") -> int:
    """Return a size or a number of things."""
    value: Any = config.get(key)
    if type(value) is not int or not 1 <= value <= _LARGEST:
        raise _wrong(config, key, f"expected a whole number of at least 1 and at most {_LARGEST}", where)
    return value


def number(config: Mapping[str, Any], key: str, where: str = "") -> float:
    """Return a finite number above 0."""
    value: Any = config.get(key)
    if type(value) not in (int, float) or not 0 < value < 1e30:  # more is a slip, or no float32
        raise _wrong(config, key, "expected a number above 0 and below 1e30", where)
    return float(value)


def flag(config: Mapping[str, Any], key: str) -> bool:
    """Return true or false; false where the key is absent."""
    value = config.get(key, False)
    if not isinstance(value, bool):
        raise _wrong(config, key, "expected true or false")
    return value


def names(config: Mapping[str, Any], key: str) -> list[str]:
    """Return a list of strings; null and an absent key are an empty one."""
    value: Any = config.get(key)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise _wrong(config, key, "expected a list of strings")
    return value


def settings(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return a copy of an object; null and an absent key are an empty one."""
    value: Any = config.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise _wrong(config, key, "expected an object")
    return dict(value)


def is_one_of(value: Any, allowed: tuple[Any, ...]) -> bool:
    """Whether `value` is allowed; unlike Python's, JSON's true is no 1."""
    return any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in allowed)


def _wrong(config: Mapping[str, Any], key: str, expected: str, where: str = "") -> UnsupportedModelError:
    return UnsupportedModelError(f"{where}{key}={config.get(key)!r:.200}, {expected}")
