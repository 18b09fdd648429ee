"""Rows from files: JSONL, Parquet and folders, and what can't be used is counted and named."""

import bz2
import csv
import gzip
import io
import json
import lzma
import math
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from samples import write_jsonl

from astar_megatron.config import DataConfig
from astar_megatron.data.prompts import read_prompts
from astar_megatron.data.rows import (
    Pair,
    Problems,
    PromptError,
    answer_field,
    pairs_of,
    read_rows,
    without_duplicates,
)
from astar_megatron.data.sources import RowSource, rows_of

ROWS = [{"question": "2 + 2?", "answer": "4"}, {"question": "Ünï\n", "answer": "5"}]


def test_parquet_jsonl_and_folders_give_the_same_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    folder = tmp_path / "folder"
    (folder / "a").mkdir(parents=True)
    write_jsonl(folder / "b.JSONL", ROWS[1:])
    pq.write_table(pa.Table.from_pylist(ROWS[:1]), folder / "a" / "x.parquet")
    (folder / "README.md").write_text("no data")
    (folder / ".cache").mkdir()
    for hidden in (folder / ".hidden.jsonl", folder / ".cache" / "c.jsonl"):
        write_jsonl(hidden, ROWS)
    tables = [
        [(row.where, dict(row.fields)) for row in read_rows(source, Problems(source))]
        for source in (tmp_path / "rows.parquet", write_jsonl(tmp_path / "rows.jsonl", ROWS), folder)
    ]
    assert [[fields for _, fields in rows] for rows in tables] == [ROWS] * 3
    assert [where for where, _ in tables[0]] == ["row 1", "row 2"]
    assert [where for where, _ in tables[2]] == ["a/x.parquet, row 1", "b.JSONL, line 1"]
    assert f"{folder}: 3 other files not read: .cache/c.jsonl, .hidden.jsonl, README.md" in caplog.text


def test_a_damaged_or_empty_source_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(PromptError, match=r"x\.parquet: not readable as Parquet"):
        read_rows(tmp_path / "x.parquet", Problems("x"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(PromptError, match="holds no prompt"):
        read_rows(tmp_path / "empty", Problems("x"))


@pytest.mark.parametrize("kind", ["link to nothing", "pipe", "linked folder"])
def test_what_of_a_folder_can_not_be_read_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    write_jsonl(tmp_path / "folder" / "a.jsonl", ROWS)
    odd = tmp_path / "folder" / "b.jsonl"
    if kind == "pipe":
        os.mkfifo(odd)
    else:
        odd.symlink_to(tmp_path if kind == "linked folder" else tmp_path / "nowhere")
    with pytest.raises(PromptError, match=r"would be left out: b\.jsonl; copy"):
        read_rows(tmp_path / "folder", Problems("x"))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become a user who may not read")
@pytest.mark.parametrize("name", ["closed", ".Trash-0", "lost+found"])
def test_a_folder_in_it_that_may_not_be_listed_is_refused_unless_it_is_nobodys_data(name: str, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    (tmp_path / name).mkdir(mode=0)
    tmp_path.chmod(0o755)
    folder = os.open(tmp_path, os.O_RDONLY)  # a path to it leads through folders of root's own
    os.seteuid(65534)
    try:
        if name != "closed":
            assert len(read_rows(f"/proc/self/fd/{folder}", Problems("x"))) == len(ROWS)
            return
        with pytest.raises(PromptError, match="can't list the folder: Permission denied"):
            read_rows(f"/proc/self/fd/{folder}", Problems("x"))
    finally:
        os.seteuid(0)
        os.close(folder)


def test_all_problems_are_counted_and_the_first_five_named(tmp_path: Path, model_folder: Any) -> None:
    bad = [{"question": "q"}] * 4 + ["text", {"question": "", "answer": "1"}, {"question": "q", "answer": None}]
    path = write_jsonl(tmp_path / "x.jsonl", [ROWS[0], *bad])
    with path.open("ab") as file:
        file.write(b'{"question": "\xff"}\n')
    with pytest.raises(PromptError) as caught:
        read_prompts(DataConfig(path=str(path)), model_folder())
    message = str(caught.value)
    assert f"{path}: 8 of 9 rows can't be used:" in message
    assert "line 6: expected a JSON object" in message and "line 9: not UTF-8" in message
    assert message.endswith("and 3 more")


@pytest.mark.parametrize(
    ("value", "answer"),
    [
        (27.0, "27"),
        (27, "27"),
        (0.5, "0.5"),
        (-3.0, "-3"),
        ("27.0", "27.0"),
        (1e16, str(10**16)),
        (1e23, str(10**23)),
        (1e-7, "0.0000001"),
    ],
)
def test_a_number_is_as_good_an_answer_as_its_text(value: object, answer: str, tmp_path: Path) -> None:
    rows = read_rows(write_jsonl(tmp_path / "x.jsonl", [{"q": "text", "a": value}]), problems := Problems("x"))
    (pair,) = pairs_of(rows, "q", answer_field("a", "set a"), problems, remedy="set q")
    assert pair.answer == answer


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64()])
def test_a_number_of_parquet_has_the_digits_of_its_own_type(kind: pa.DataType, tmp_path: Path) -> None:
    answers = pa.array([0.1, 27.0, 0.5, None], pa.float64()).cast(kind)
    pq.write_table(pa.table({"q": ["text"] * 4, "a": answers}), tmp_path / "x.parquet")
    rows = read_rows(tmp_path / "x.parquet", problems := Problems("x"))
    pairs = pairs_of(rows, "q", answer_field("a", "set a"), problems, remedy="set q")
    assert [pair.answer for pair in pairs] == ["0.1", "27", "0.5"] and problems.count == 1


def test_a_number_within_an_object_of_parquet_has_the_digits_of_its_own_type(tmp_path: Path) -> None:
    within = {"a": pa.float32(), "b": pa.float64(), "c": pa.large_list(pa.float16()), "d": pa.list_(pa.float32(), 2)}
    narrow = pa.list_(pa.struct(within))
    values = [[{"a": 0.1, "b": 0.1, "c": [0.1, None], "d": [0.1, 0.2]}, None], None, []]
    pq.write_table(pa.table({"x": pa.array(values, narrow)}), tmp_path / "x.parquet")
    assert [row.fields["x"] for row in read_rows(tmp_path / "x.parquet", Problems("x"))] == values


@pytest.mark.parametrize(("kind", "number"), [(pa.float16(), 10008.0), (pa.float32(), 123456792.0)])
def test_a_whole_number_of_parquet_keeps_all_its_digits(kind: pa.DataType, number: float, tmp_path: Path) -> None:
    table = pa.table({"q": ["text"], "a": pa.array([number], pa.float64()).cast(kind)})
    pq.write_table(table, tmp_path / "x.parquet")
    rows = read_rows(tmp_path / "x.parquet", problems := Problems("x"))
    (pair,) = pairs_of(rows, "q", answer_field("a", "set a"), problems, remedy="set q")
    assert pair.answer == str(int(number))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e400, None])
def test_what_is_no_number_is_a_missing_answer(value: object, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x.jsonl", [{"q": "text", "a": value}])
    pq.write_table(pa.table({"q": ["text"], "a": pa.array([value], pa.float64())}), tmp_path / "x.parquet")
    rows = read_rows(tmp_path, problems := Problems("x"))
    assert len(rows) == 2 and pairs_of(rows, "q", answer_field("a", "set a"), problems, remedy="set q") == []
    assert "2 of 2 rows" in (message := problems.message(2)) and message.count("so it is missing") == 2


def test_a_row_of_parquet_that_is_not_utf_8_is_a_problem_of_its_own(tmp_path: Path) -> None:
    texts = [b"a", b"\xff", *[b"b"] * 1100, b"\xfe", b"c"]
    column = pa.array(texts, pa.binary()).cast(pa.string(), safe=False).view(pa.string())
    pq.write_table(pa.table({"q": column, "a": ["1"] * 1104}), tmp_path / "x.parquet")
    rows = read_rows(tmp_path / "x.parquet", problems := Problems("x"))
    pairs = pairs_of(rows, "q", answer_field("a", "set a"), problems, remedy="set q")
    assert [pair.where for pair in pairs][:2] == ["row 1", "row 3"]
    assert (len(pairs), pairs[-1].where, pairs[-1].question) == (1102, "row 1104", "c")
    message = problems.message(1104)
    assert "2 of 1104 rows" in message and "row 2: field 'q': not UTF-8" in message and "row 1103: " in message


def test_columns_of_parquet_that_nobody_asks_for_may_be_of_any_kind(tmp_path: Path) -> None:
    arrays = {
        "q": pa.array(["text"]),
        "a": pa.array(["1"]),
        "time": pa.array([0], pa.timestamp("us", tz="Mars/Phobos")),
        "year": pa.array([10**18], pa.timestamp("us")),
        "text": pa.array([b"\xff"], pa.binary()).cast(pa.string(), safe=False).view(pa.string()),
        "vectors": pa.array([[0.5] * 1000]),
    }
    names, columns = [*arrays, "twice", "twice"], [*arrays.values(), pa.array([1]), pa.array([2])]
    pq.write_table(pa.Table.from_arrays(columns, names=names), tmp_path / "x.parquet")
    rows = read_rows(tmp_path / "x.parquet", problems := Problems("x"))
    (pair,) = pairs_of(rows, "q", answer_field("a", "set a"), problems, remedy="set q")
    assert (pair.question, pair.answer) == ("text", "1")
    lost = "holds what Python can't"
    for name, message in {"year": lost, "time": lost, "none": "only 'q', 'a', 'time'"}.items():
        problems = Problems("x")
        assert pairs_of(rows, name, answer_field("a", "set a"), problems, remedy="set q") == []
        assert message in problems.message(1)
    with pytest.raises(PromptError, match="has 2 columns 'twice'; rename"):
        pairs_of(rows, "q", answer_field("twice", "set a"), problems, remedy="set q")


def test_of_a_damaged_column_all_is_refused_and_only_where_it_is_asked_for(tmp_path: Path) -> None:
    table = pa.table({"q": ["text"] * 100, "a": ["answer"] * 100})
    pq.write_table(table, path := tmp_path / "x.parquet", write_page_checksum=True, compression="none")
    data = path.read_bytes()
    place = data.index(b"answer")
    path.write_bytes(data[:place] + b"A" + data[place + 1 :])
    rows = read_rows(path, problems := Problems("x"))
    assert rows[0].fields["q"] == "text"
    with pytest.raises(PromptError, match=r"x\.parquet: not readable as Parquet: .*copy it again"):
        pairs_of(rows, "q", answer_field("a", "set a"), problems, remedy="set q")


def _csv(rows: Any) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["question", "answer"])
    writer.writeheader()
    writer.writerows(rows)
    return b"\xef\xbb\xbf" + text.getvalue().encode()


def _zipped(name: str, content: bytes) -> bytes:
    with zipfile.ZipFile(archive := io.BytesIO(), "w") as opened:
        opened.writestr(name, content)
    return archive.getvalue()


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("x.jsonl.gz", gzip.compress(b"{}"), "compressed by gzip"),
        ("x.jsonl.zst", pa.Codec("zstd").compress(b"{}", asbytes=True), "compressed by zstd"),
        ("x.jsonl.bz2", bz2.compress(b"{}"), "compressed by bzip2"),
        ("x.jsonl.xz", lzma.compress(b"{}"), "compressed by xz"),
        ("x.zip", _zipped("x.jsonl", b"{}"), "a zip archive"),
        ("x.data", b"PAR1 and more", "Parquet under a name that does not end in .parquet"),
        ("x.json", json.dumps(ROWS, indent=2).encode(), "a JSON array"),
        ("x.json", b"\xef\xbb\xbf" + json.dumps(ROWS, ensure_ascii=False, indent=2).encode(), "a JSON array"),
        ("x.json", "\n".join(json.dumps(row, indent=2) for row in ROWS).encode(), "JSON of several lines an object"),
        ("it's x.json", json.dumps(ROWS).encode(), "a JSON array"),
        ("x.CSV", _csv([*ROWS, {"question": "9" * 200_000, "answer": "5"}]), "CSV"),
    ],
)
def test_a_file_of_another_kind_is_refused_with_the_command_that_converts_it(
    name: str, content: bytes, kind: str, folder: bool, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PromptError) as caught:
        read_rows(tmp_path if folder else tmp_path / name, Problems("x"))
    words, _, command = str(caught.value).partition("; convert it: ")
    assert words.endswith(f"{tmp_path / name}: is {kind}, expected one JSON object a line, or Parquet")
    if command.startswith("python "):
        subprocess.run(command.replace("python", sys.executable, 1), shell=True, check=True)
    if "_lines.jsonl" in command:
        written = read_rows(tmp_path / f"{Path(name).stem}_lines.jsonl", Problems("x"))
        assert [row.fields for row in written][:2] == ROWS
    if command.startswith(("gunzip ", "bzip2 ", "xz ")):
        if shutil.which(command.split()[0]) is None:
            pytest.skip(f"needs the program {command.split()[0]}")
        subprocess.run(command, shell=True, check=True)
        assert (tmp_path / "x.jsonl").read_bytes() == b"{}"
    if name == "x.zip":
        assert (tmp_path / "x" / "x.jsonl").read_bytes() == b"{}"
    if command.startswith("mv "):
        subprocess.run(command, shell=True, check=True)
        assert (tmp_path / "x.data.parquet").exists()


def test_each_file_of_a_folder_gets_its_command(tmp_path: Path) -> None:
    for name in ("test.json", "train.json"):
        (tmp_path / name).write_text(json.dumps(ROWS))
    with pytest.raises(PromptError, match=r"^\S+: no \.jsonl .*/test\.json: is a JSON array.*; \S+/train\.json: is a"):
        read_rows(tmp_path, Problems("x"))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("question,answer\nWhat is 1,000 + 2?,1002\n", "longer than argument 1"),  # a comma without quotes
        ("question,answer\nWhat is 1?\n", "shorter than argument 1"),
        ("q,a,a\nx,1,2\n", "AssertionError"),
    ],
)
def test_a_table_that_is_not_sound_is_not_converted(table: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(table)
    with pytest.raises(PromptError) as caught:
        read_rows(tmp_path / "x.csv", Problems("x"))
    command = str(caught.value).partition("; convert it: ")[2].replace("python", sys.executable, 1)
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.returncode and message in done.stderr


NUMBERS = ["27.0", "12345678901234567890.50", "9007199254740993", "1e-7", "[27.0, 5]", "null", '"27.0"']


@pytest.mark.parametrize("text", ["[{}]", "[\n {} ]\n", "{}\n"])
def test_numbers_of_converted_json_are_read_as_those_of_lines(text: str, tmp_path: Path) -> None:
    rows = [f'{{\r\n"q": "x, [y] \\n",\n\n"a":\t{number}}}' for number in NUMBERS]
    between = ",\n" if text.startswith("[") else " "
    (tmp_path / "x.json").write_bytes(text.replace("{}", between.join(rows)).encode())
    _convert(tmp_path / "x.json")
    (tmp_path / "y.jsonl").write_text("".join(f'{{"q": "x, [y] \\n", "a": {number}}}\n' for number in NUMBERS))
    converted, lines = (
        [dict(row.fields) for row in read_rows(tmp_path / name, Problems("x"))] for name in ("x_lines.jsonl", "y.jsonl")
    )
    assert converted == lines and len(lines) == len(NUMBERS)
    texts = [
        [pair.answer for pair in pairs_of(rows, "q", answer_field("a", "set a"), Problems("x"), remedy="set q")]
        for rows in (read_rows(tmp_path / name, Problems("x")) for name in ("x_lines.jsonl", "y.jsonl"))
    ]
    assert texts[0] == texts[1] == ["27", "12345678901234567890.5", "9007199254740993", "0.0000001", "27.0"]


@pytest.mark.parametrize("text", ['[{"a": 1}, {"a": 2}', '[{"a": 1} {"a": 2}]', '{\n"a": 1}\n{"a":'])
def test_damaged_json_is_not_converted(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(subprocess.CalledProcessError):
        _convert(tmp_path / "x.json")


def _convert(path: Path) -> None:
    """Run the command that a file of another kind is refused with."""
    with pytest.raises(PromptError) as caught:
        read_rows(path, Problems("x"))
    command = str(caught.value).partition("; convert it: ")[2].replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, check=True, stderr=subprocess.DEVNULL)


def test_what_a_shell_would_expand_is_told_that_nothing_does(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    for source in (tmp_path / "*.jsonl", tmp_path / "[a].jsonl"):
        with pytest.raises(PromptError, match="patterns are not expanded: name the folder"):
            read_rows(source, Problems("x"))
        with pytest.raises(PromptError, match="patterns are not expanded: name the folder"):
            rows_of(RowSource(str(source), "hf"), Problems("x"))


@pytest.mark.parametrize("name", ["pipe.jsonl", "pipe.parquet"])
def test_a_pipe_is_refused_and_not_waited_for(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    for source in (tmp_path / name, Path("/dev/zero")):
        with pytest.raises(PromptError, match=f"{source}: is no regular file"):
            read_rows(source, Problems("x"))


def test_the_first_of_equal_prompts_stays_and_none_of_those_with_two_answers() -> None:
    pairs = [Pair(where=f"line {i}", question=q, answer=a) for i, (q, a) in enumerate(["x1", "y2", "x1", "x3", "y2"])]
    problems = Problems("file")
    assert without_duplicates(pairs, [pair.question for pair in pairs], problems) == [1]
    with pytest.raises(
        PromptError,
        match=r"3 of 5 rows can't be used:\n  line 0: its prompt has two answers, '1' .line 0. and '3' .line 3",
    ):
        problems.refuse(5)
