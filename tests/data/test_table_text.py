"""Tables as text."""

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
