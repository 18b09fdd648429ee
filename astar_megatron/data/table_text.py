"""A table as text: Markdown for people, CSV for programs."""

import csv
import io
import re
from collections.abc import Iterable, Sequence
from typing import Any


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table in Markdown, without the end of its last line.

    No text of a cell ends the cell or its line, and its backslashes are shown as they are.
    """

    def line(cells: Sequence[Any]) -> str:
        texts = (re.sub(r"\r\n|\r|\n", "<br>", re.sub(r"[\\|]", r"\\\g<0>", str(cell))) for cell in cells)
        return f"| {' | '.join(texts)} |"

    return "\n".join([line(columns), line(["---"] * len(columns)), *map(line, rows)])


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table in CSV; None is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()
