"""Rows of a table that is kept by columns, of which one is read when it is first asked for.

So the columns that nobody asks for may be of any kind and size: times of an unknown zone, vectors, two of one name.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any


class Table:
    """A table of columns `names`, each of which `read` gives as Python's values."""

    def __init__(self, names: Sequence[str], read: Callable[[str], list[Any]]) -> None:
        self.names = tuple(names)
        self._read, self._columns = read, dict[str, list[Any]]()

    def column(self, name: str) -> list[Any]:
        if name not in self._columns:
            self._columns[name] = self._read(name)
        return self._columns[name]


class Fields(Mapping[str, Any]):
    """One row of a table. To ask for a value raises ValueError where Python can't hold it, PromptError for damage."""

    def __init__(self, table: Table, index: int) -> None:
        self._table, self._index = table, index

    def __getitem__(self, name: str) -> Any:
        if name not in self:
            raise KeyError(name)
        value = self._table.column(name)[self._index]
        if isinstance(value, ValueError):
            raise ValueError(f"field {name!r}: {value}")
        return value

    def __contains__(self, name: object) -> bool:
        return name in self._table.names

    def __iter__(self) -> Iterator[str]:
        return iter(self._table.names)

    def __len__(self) -> int:
        return len(self._table.names)


def python_values(column: Any) -> list[Any]:
    """Return the values of a column of Arrow; a ValueError in place of each that Python can't hold."""
    try:
        return column.to_pylist()
    except (ValueError, OverflowError, LookupError):
        return [_python_value(scalar) for scalar in column]


def _python_value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8 ({error}); convert the text to UTF-8")
    except (ValueError, OverflowError, LookupError) as error:  # a year, a zone or a number that Python has not
        return ValueError(f"holds what Python can't ({error}); write it as text")


def shortest_floats(values: list[Any], kind: Any) -> list[Any]:
    """Return the values of a column of type `kind`, floats below 64 bits by their shortest digits, in objects too.

    So a float32 is 0.1, not 0.10000000149011612. A whole number is as it is: 123456792, not 123456790.
    """
    shortest = _shortest(kind)
    return [shortest(value) for value in values] if shortest else values


def _shortest(kind: Any) -> Callable[[Any], Any] | None:
    """What makes the floats below 64 bits within a value of type `kind` short; None where the type has none."""
    import numpy as np
    import pyarrow as pa

    if narrow := {pa.float16(): np.float16, pa.float32(): np.float32}.get(kind):
        return lambda value: value if value is None or float(value).is_integer() else float(str(narrow(value)))
    if pa.types.is_struct(kind):
        within = {field.name: shortest for field in kind if (shortest := _shortest(field.type))}
        return (lambda value: _with_short(value, within)) if within else None
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if is_list and (of_item := _shortest(kind.value_type)):
        return lambda value: [of_item(item) for item in value] if isinstance(value, list) else value
    return None


def _with_short(value: Any, within: Mapping[str, Callable[[Any], Any]]) -> Any:
    if not isinstance(value, dict):  # none, or an error that stands in its place
        return value
    return value | {name: shortest(value[name]) for name, shortest in within.items()}
