"""One-digit additions: data that the project makes itself, so that the demo needs no download."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from astar_megatron.data.files import make_folder, write_atomic


def one_digit_additions() -> list[dict[str, str]]:
    """Return the 64 additions of 2..9 and 2..9 as rows with `question` and `answer`."""
    return [
        {"question": f"What is {a} + {b}? Answer with just the number.", "answer": str(a + b)}
        for a in range(2, 10)
        for b in range(2, 10)
    ]


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, str]]) -> None:
    """Write `rows` to `path`, one JSON object a line, whole or not at all. Raises StorageError."""
    make_folder(Path(path).parent)
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8"))
