"""Tables as text."""

import re

import pytest

from astar_megatron.data.table_text import csv_text, markdown_table


def test_no_text_of_a_cell_ends_the_cell_or_its_line() -> None:
    rows = [("a|b", 1), ("two\nlines", None)]
    assert markdown_table(("name", "count"), rows).splitlines() == [
        "| name | count |",
        "| --- | --- |",
        r"| a\|b | 1 |",
        "| two<br>lines | None |",
    ]
    assert csv_text(("name", "count"), rows) == 'name,count\na|b,1\n"two\nlines",\n'


@pytest.mark.parametrize("text", ["|", r"a\|b", r"a\\|b", "||", "\\", r"\frac{1}{2} \(x\)", "a\rb", "a\r\nb", "\n|\r"])
def test_a_cell_is_shown_as_its_text(text: str) -> None:
    (line,) = markdown_table((text,), []).splitlines()[:-1]
    (cell,) = re.findall(r"(?:\\.|[^\\|])+", line[1:-1])  # as GFM's reader takes cells: a backslash and what it escapes
    assert re.sub(r"\\(.)", r"\1", cell) == f" {re.sub('\r\n|[\r\n]', '<br>', text)} "
