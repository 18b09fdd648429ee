"""`astar data`: what it writes is what data.path reads, and what can't be used is counted."""

import importlib.util
import math
import os
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import samples
import yaml
from samples import read_jsonl, write_jsonl

from astar_megatron import config, config_file
from astar_megatron.config import DataConfig, RunConfig
from astar_megatron.data.chat import bare_template, tokenizer
from astar_megatron.data.contract import contract_of
from astar_megatron.data.prompts import read_prompts
from astar_megatron.data.rows import PromptError, hub_rows
from astar_megatron.data.v_star import VStarTable

type Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def data(astar: Any) -> Command:
    """Return a function that runs `astar data ...` and gives exit status, stdout and stderr."""
    return lambda *arguments: astar("data", *arguments)


def test_gsm8k_and_math_keep_the_final_answer_and_name_suffix_and_reward(data: Command, tmp_path: Path) -> None:
    out = tmp_path / "new" / "prompts.jsonl"
    source = write_jsonl(
        tmp_path / "gsm8k.jsonl", [{"question": "How?", "answer": "6*200=<<6*200=1200>>1,200\n#### 1,200"}]
    )
    status, report, _ = data("gsm8k", source, "--out", out)
    assert (status, read_jsonl(out)) == (0, [{"question": "How?", "answer": "1200"}])
    assert "reward.name: gsm8k_strict" in report
    shown = dict(line.strip().split(": ", 1) for line in report.splitlines()[1:])
    words = ' Let\'s think step by step and output the final answer after "####".'
    assert yaml.safe_load(shown["data.suffix"]) == words
    option, value = shlex.split(shown["on a command line"])
    assert option == "--set"
    (tmp_path / "empty.yaml").write_text("{}")
    assert config_file.read(tmp_path / "empty.yaml", [value]) == {"data": {"suffix": words}}
    out = tmp_path / "math" / "prompts.jsonl"
    source = write_jsonl(tmp_path / "math.jsonl", [{"problem": "Why?", "solution": r"\boxed{1} so \boxed{\frac12}"}])
    status, report, _ = data("math", source, "--out", out)
    assert (status, read_jsonl(out)) == (0, [{"question": "Why?", "answer": r"\frac12"}])
    assert "reward.name: math" in report


def test_rows_that_cannot_be_used_are_refused_or_left_out_with_their_count(data: Command, tmp_path: Path) -> None:
    rows = [
        {"q": "one", "a": 1},
        {"q": "one", "a": "1"},  # an exact duplicate
        {"q": "two", "a": "Paris"},  # the reward can't read it
        {"q": "three"},
        {"q": "one", "a": "2"},  # another answer
        {"q": "four", "a": "4"},
    ]
    source, out = write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl"
    arguments = ["jsonl", source, "--out", out, "--question-field", "q", "--answer-field", "a"]
    arguments += ["--reward", "last_number"]
    status, _, error = data(*arguments)
    assert status == 2 and not out.exists()
    assert "5 of 6 rows can't be used" in error
    assert "line 3: the reward last_number can't read the answer" in error and "line 4: no field 'a'" in error
    status, report, _ = data(*arguments, "--drop")
    assert (status, read_jsonl(out)) == (0, [{"question": "four", "answer": "4"}])
    assert "left out: 5 of 6 rows" in report and "5 of 6 rows can't be used" in report


def test_a_reward_of_ones_own_runs_away_from_the_command(
    data: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ends.py").write_text(
        "import os\ndef f(response, answer):\n"
        "    print('noise')\n    return os._exit(3) if answer == 'end' else float(answer)\n"
    )
    monkeypatch.chdir(tmp_path)
    rows = [{"question": str(i), "answer": answer} for i, answer in enumerate(["1", "end", "Paris", *["0"] * 40])]
    source, kept = write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "kept.jsonl"
    status, report, _ = data("jsonl", source, "--reward", "ends:f", "--out", kept, "--drop")
    assert (status, read_jsonl(kept)) == (0, [rows[0], *rows[3:]])
    assert "line 2: the reward ends:f can't read the answer: ended its process" in report and "noise" not in report
    write_jsonl(source, [{"question": str(i), "answer": "end"} for i in range(1000)])
    status, _, error = data("jsonl", source, "--reward", "ends:f", "--out", kept, "--drop")
    assert status == 2 and "prompts can't be scored" in error and " of the first " in error


@pytest.mark.parametrize("link", ["itself", "symbolic", "hard", "folder"])
def test_the_source_is_never_overwritten(link: str, data: Command, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    source = write_jsonl(tmp_path / "data" / "x.jsonl", [{"question": "a", "answer": "1"}])
    before, out = source.read_bytes(), tmp_path / "out.jsonl"
    if link == "symbolic":
        out.symlink_to(source)
    elif link == "hard":
        out.hardlink_to(source)
    else:
        out = source
    status, _, error = data("jsonl", source.parent if link == "folder" else source, "--out", out)
    assert status == 2 and f"--out: {out} is {source}, which the rows come from" in error
    assert source.read_bytes() == before and out.samefile(source)


def test_what_is_there_with_other_prompts_is_kept(data: Command, tmp_path: Path) -> None:
    source, out = write_jsonl(tmp_path / "x.jsonl", [{"question": "a", "answer": "1"}]), tmp_path / "out.jsonl"
    for arguments in (["jsonl", source, "--out", out], ["countdown", "--out", tmp_path / "c", "--rows", 3]):
        assert data(*arguments)[0] == data(*arguments)[0] == 0  # again: the same content
    out.write_text("mine")
    for arguments in (["jsonl", source, "--out", out], ["countdown", "--out", out, "--rows", 3]):
        status, _, error = data(*arguments)
        assert status == 2 and f"--out: {out} is there with other prompts; remove it" in error
    assert out.read_text() == "mine"


def test_a_place_that_nothing_can_be_written_to_is_refused_before_the_rows_are_read(
    data: Command, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for out, problem in (
        (tmp_path / "file" / "x.jsonl", f"{tmp_path / 'file'} is no folder that you may write to"),
        (tmp_path / "loop" / "x.jsonl", f"{tmp_path / 'loop'} is no folder that you may write to"),
        (tmp_path, f"{str(tmp_path)!r} is a folder"),
        *((device, f"{device} is no regular file") for device in ("/dev/null", "/dev/zero")),
    ):
        status, _, error = data("jsonl", tmp_path / "not_there.jsonl", "--out", out)
        assert status == 2 and f"--out: {problem}" in error


@pytest.mark.parametrize("place", ["link.jsonl", "folder/x.jsonl"])
def test_a_link_is_written_where_it_points(
    place: str, data: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, links = write_jsonl(tmp_path / "x.jsonl", [{"question": "a", "answer": "1"}]), tmp_path / "links"
    links.mkdir()
    (links / "link.jsonl").symlink_to(tmp_path / "new" / "x.jsonl")
    (links / "folder").symlink_to(tmp_path / "new")
    monkeypatch.setattr(
        os, "access", lambda path, _, **__: Path(path) != links
    )  # as in another's folder; root may write
    assert data("jsonl", source, "--out", links / place)[0] == 0
    assert read_jsonl(tmp_path / "new" / "x.jsonl") == [{"question": "a", "answer": "1"}]


@pytest.mark.parametrize("kind", ["countdown", "arithmetic", "multiply"])
def test_what_is_made_is_read_as_prompts(kind: str, data: Command, tmp_path: Path, tied_llama: Path) -> None:
    status, report, _ = data(kind, "--out", tmp_path / "x.jsonl", "--rows", 30, "--seed", 5)
    assert status == 0 and f"reward.name: {kind}" in report
    prompts = read_prompts(DataConfig(path=str(tmp_path / "x.jsonl"), max_prompt_tokens=1000), str(tied_llama))
    assert len(prompts) == 30


def test_a_data_set_of_the_hub_is_read_by_the_package_datasets(data: Command, tmp_path: Path) -> None:
    if importlib.util.find_spec("datasets") is None:
        status, _, error = data("gsm8k", "--out", tmp_path / "x.jsonl")
        assert status == 2 and "needs the package datasets; install astar-megatron[data]" in error
        return
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "test.jsonl", [{"question": "a", "answer": 1}])
    (row,) = hub_rows(str(tmp_path / "set"), None, "test")
    assert (row.where, dict(row.fields)) == ("row 1", {"question": "a", "answer": 1})
    table = pa.table({"question": ["a"], "answer": pa.array([0.1], pa.float32()), "kind": [{"b": 1}]})
    (tmp_path / "narrow").mkdir()
    pq.write_table(table, tmp_path / "narrow" / "train.parquet")
    (row,) = hub_rows(str(tmp_path / "narrow"), None, "train")
    assert dict(row.fields) == {"question": "a", "answer": 0.1, "kind": {"b": 1}}
    status, _, error = data("hf", "no/such-data-set", "--out", tmp_path / "y.jsonl")
    assert status == 2 and "can't load it (split 'train')" in error


def _question(folder: Path, name: str) -> None:
    """Write a file whose one question is its name."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    rows = [{"question": name, "answer": "1"}]
    if name.endswith(".jsonl"):
        write_jsonl(folder / name, rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), folder / name)


_GSM8K = [
    *("main/test-00000-of-00001.parquet", "main/train-00000-of-00002.parquet", "main/train-00001-of-00002.parquet"),
    *("socratic/test-00000-of-00001.parquet", "socratic/train-00000-of-00001.parquet"),
]


@pytest.mark.parametrize(
    ("kind", "names", "asked", "read"),
    [
        ("gsm8k", _GSM8K, [], _GSM8K[1:3]),
        ("gsm8k", _GSM8K, ["--split", "test"], _GSM8K[:1]),
        ("hf", _GSM8K, ["--subset", "socratic"], _GSM8K[4:]),
        ("hf", ["train.jsonl", "test.jsonl"], [], ["train.jsonl"]),
        ("hf", ["x/train/0000.parquet", "x/test/0000.parquet"], ["--subset", "x"], ["x/train/0000.parquet"]),
        ("hf", ["train_sft.jsonl", "test.jsonl"], ["--split", "train_sft"], ["train_sft.jsonl"]),
        ("hf", ["gsm8k_train.jsonl", "gsm8k_test.jsonl"], [], ["gsm8k_train.jsonl"]),
        ("hf", ["a.jsonl", "part/b.jsonl"], [], ["a.jsonl", "part/b.jsonl"]),
        (
            "jsonl",
            ["a-00000-of-00002.jsonl", "a-00001-of-00002.jsonl"],
            [],
            [f"a-0000{i}-of-00002.jsonl" for i in (0, 1)],
        ),
        ("jsonl", ["train.jsonl", "extra.jsonl"], [], ["extra.jsonl", "train.jsonl"]),
        ("hf", ["train.jsonl", "test-00000-of-00002.jsonl"], [], ["train.jsonl"]),
    ],
)
def test_of_a_folder_as_the_hub_has_it_the_files_of_a_subset_and_a_split_are_read(
    kind: str, names: list[str], asked: list[str], read: list[str], data: Command, tmp_path: Path
) -> None:
    for name in names:
        _question(tmp_path / "set", name)
    status, _, error = data(kind, tmp_path / "set", "--out", tmp_path / "out.jsonl", *asked)
    assert status == 0, error
    assert [row["question"] for row in read_jsonl(tmp_path / "out.jsonl")] == read


@pytest.mark.parametrize(
    ("names", "asked", "message"),
    [
        (_GSM8K, [], "lie in several folders"),
        (_GSM8K, ["--subset", "minor"], "--subset minor: there is no such folder"),
        (["train.jsonl"], ["--split", "dev"], "has no file of the split dev"),
        (["test.jsonl"], [], "has no file of the split train (train.jsonl, train-00000-of-00001.parquet), but test"),
        (["train_sft-00000-of-00001.parquet", "test_sft-00000-of-00001.parquet"], [], "but test_sft-0"),
        (["math-train.jsonl", "train_and_test.jsonl"], [], "whose split is not known, train_and_test.jsonl"),
        (["train.jsonl", "extra.jsonl"], [], "there are files whose split is not known, extra.jsonl"),
    ],
)
def test_files_of_a_folder_whose_split_or_subset_is_not_known_are_refused(
    names: list[str], asked: list[str], message: str, data: Command, tmp_path: Path
) -> None:
    for name in names:
        _question(tmp_path / "set", name)
    status, _, error = data("hf", tmp_path / "set", "--out", tmp_path / "out.jsonl", *asked)
    assert status == 2 and message in error.replace("\n", " "), error


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["train-00000-of-00003.parquet", "train-00002-of-00003.parquet"],
            "1 shards are missing: train-00001-of-00003;",
        ),
        (["part/train-00000-of-00002.jsonl"], "1 shards are missing: train-00001-of-00002;"),
    ],
)
def test_a_folder_that_lacks_a_shard_is_refused_whoever_reads_it(
    names: list[str], message: str, data: Command, tmp_path: Path, tied_llama: Path
) -> None:
    for name in names:
        _question(tmp_path / "set", name)
    for kind in ("hf", "jsonl"):
        status, _, error = data(kind, tmp_path / "set", "--out", tmp_path / "out.jsonl")
        assert status == 2 and message in error.replace("\n", " "), error
    with pytest.raises(PromptError, match=message):
        read_prompts(DataConfig(path=str(tmp_path / "set")), str(tied_llama))
    assert len(read_prompts(DataConfig(path=str(tmp_path / "set" / names[0])), str(tied_llama))) == 1


def test_data_sets_beside_each_other_are_read_as_one(tmp_path: Path, tied_llama: Path) -> None:
    for name in ("gsm8k-00000-of-00001.parquet", "math-00000-of-00001.parquet", "train-more.parquet"):
        _question(tmp_path / "set", name)
    assert len(read_prompts(DataConfig(path=str(tmp_path / "set")), str(tied_llama))) == 3


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["train-0.parquet", "test-0.parquet"], ["test", "train"]),
        (["x/train/0.jsonl", "x/test/0.jsonl"], ["test", "train"]),
        (["train_sft-00000-of-00001.parquet", "test_sft-00000-of-00001.parquet"], ["test_sft", "train_sft"]),
    ],
)
def test_a_folder_of_several_splits_is_not_read_as_one(
    names: list[str], splits: list[str], data: Command, tmp_path: Path, tied_llama: Path
) -> None:
    for name in names:
        _question(tmp_path / "set", name)
    message = f"its files are of the splits {', '.join(splits)}, all of which would be read; name one file or"
    status, _, error = data("jsonl", tmp_path / "set", "--out", tmp_path / "out.jsonl")
    assert status == 2 and message in error.replace("\n", " "), error
    with pytest.raises(PromptError, match=message) as caught:
        read_prompts(DataConfig(path=str(tmp_path / "set")), str(tied_llama))
    command = shlex.split(str(caught.value).partition("write one with astar data ")[2].replace("NAME", splits[0]))
    assert data(*command, "--out", tmp_path / "out.jsonl")[0] == 0
    assert [row["question"] for row in read_jsonl(tmp_path / "out.jsonl")] == names[1:]


def test_a_split_of_one_file_is_refused(data: Command, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", [{"question": "a", "answer": "1"}])
    status, _, error = data("gsm8k", source, "--split", "test", "--out", tmp_path / "out.jsonl")
    assert status == 2 and "--split test: one file is read whole" in error


def _stage1(**changes: Any) -> dict[str, Any]:
    row = {
        "data_source": "gsm8k",
        "prompt": [{"role": "user", "content": "What is 1 + 1?"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "2"},
        "extra_info": {"index": 0},
    }
    for i, (response, value) in enumerate((("2", 1.0), ("3</s>", 0.0), ("12 2 = ?", 1.0))):
        row |= {f"response_{i}": response, f"eval_{i}": value}
    return row | changes


@pytest.fixture
def stage1(tmp_path: Path, tied_llama: Path, data: Command) -> Command:
    """Return a function that imports stage-1 rows, or again those of before, into the run of tmp_path / "run.yaml"."""
    model = shutil.copytree(tied_llama, tmp_path / "bare")
    (model / "chat_template.jinja").write_text(bare_template(str(tied_llama)) + "\n")
    tree = samples.run_tree(
        run_dir=str(tmp_path / "run"),
        model={"path": str(model)},
        data={"path": str(tmp_path / "prompts" / "p.jsonl"), "max_prompt_tokens": 30},
        sampling={"max_response_tokens": 8},
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))

    def run(*rows: dict[str, Any], settings: Sequence[str] = ()) -> tuple[int, str, str]:
        source = tmp_path / "stage1.parquet"
        if rows:
            columns = dict.fromkeys(name for row in rows for name in row)
            pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in columns}), source)
        overrides = [word for setting in settings for word in ("--set", setting)]
        return data("import-stage1", source, "--config", tmp_path / "run.yaml", *overrides)

    return run


@pytest.fixture
def cfg(stage1: Command, tmp_path: Path) -> RunConfig:
    return config.load(tmp_path / "run.yaml")


def columns_of(folder: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in sorted(folder.glob("*.parquet"))])


def test_published_stage1_data_becomes_prompts_and_a_table_with_the_run_s_rewards(
    stage1: Command, cfg: RunConfig
) -> None:
    other = _stage1(
        prompt=[{"role": "user", "content": "What is 1 + 2?"}],
        reward_model={"style": "rule", "ground_truth": "3"},
        eval_0=0.0,
        eval_1=1.0,
        eval_2=1.0,  # wrong: its last number is 2
    )
    status, report, error = stage1(_stage1(), other)
    assert status == 0, error
    assert "6 imported" in report and "of the 6 imported 1 differ from the published ones" in report
    assert f"prompts: 2, written to {cfg.data.path}" in report
    prompts = read_prompts(cfg.data, cfg.model.path)
    table = VStarTable.open(cfg.table_dir, contract_of(cfg))
    assert [table.rewards()[prompt.uid] for prompt in prompts] == [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]
    columns, tok = columns_of(cfg.table_dir), tokenizer(cfg.model.path)
    assert columns["finish_reason"].to_pylist() == ["stop", "stop", "length"] * 2  # eight tokens are the limit
    assert columns["response"].to_pylist()[1] == [*tok("3")["input_ids"], tok.eos_token_id]
    assert all(math.isnan(value) for value in columns["logprob"].to_pylist())
    status, report, _ = stage1()
    assert status == 0 and "0 imported, 6 were there" in report
    assert "of the 0 imported 0 differ" in report and f"prompts: 2, there already, in {cfg.data.path}" in report


def test_an_imported_response_ends_at_any_stop_token_and_keeps_the_other_special_ones(
    stage1: Command, cfg: RunConfig, tmp_path: Path
) -> None:
    model = shutil.copytree(cfg.model.path, tmp_path / "model")
    (model / "generation_config.json").write_text('{"eos_token_id": [2, 4]}')
    row = _stage1(response_0="2<assistant>", response_1="3<user>2", eval_1=1.0)
    status, report, error = stage1(row, settings=[f"model.path={model}"])
    assert status == 0 and "3 imported" in report, error
    two, three = (tokenizer(str(model)).convert_tokens_to_ids(text) for text in "23")
    assert columns_of(cfg.table_dir)["response"].to_pylist()[:2] == [[two, 4], [three, 3, two, 2]]


@pytest.mark.parametrize(
    ("response", "place"), [("2</s>3</s>", "2 of 3"), ("2</s></s>", "2 of 2"), ("</s>3", "1 of 2")]
)
def test_an_imported_response_that_goes_on_behind_a_stop_token_is_refused(
    response: str, place: str, stage1: Command, cfg: RunConfig
) -> None:
    status, _, error = stage1(_stage1(), _stage1(prompt=_user("x"), response_1=response))
    assert status == 2 and "1 of 6 responses go on behind a stop token" in error, error
    assert f"row 2, response_1, has one at token {place}" in error.replace("\n", " ")
    assert not Path(cfg.data.path).exists() and not cfg.table_dir.exists()


def test_an_imported_response_that_the_model_has_no_row_for_is_refused(
    stage1: Command, cfg: RunConfig, tmp_path: Path
) -> None:
    model = shutil.copytree(cfg.model.path, tmp_path / "model")
    large = tokenizer(str(model))
    large.add_tokens([f"more{i}" for i in range(300)])
    large.save_pretrained(model)
    tokenizer.cache_clear()
    status, _, error = stage1(_stage1(response_1="more299"), settings=[f"model.path={model}"])
    assert status == 2 and "1 of 3 responses hold" in error and "vocab_size is 263" in error
    assert not (tmp_path / "run").exists()


def test_an_import_is_asked_with_the_run_s_suffix_and_evaluation_too(
    stage1: Command, cfg: RunConfig, tmp_path: Path
) -> None:
    row, settings = _stage1(prompt=_user("What is 1 + 1? Go.")), ['data.suffix=" Go."']
    status, _, error = stage1(row, settings=settings)
    assert status == 0, error
    assert read_jsonl(Path(cfg.data.path)) == [{"question": "What is 1 + 1?", "answer": "2"}]
    run = config.load(tmp_path / "run.yaml", settings)
    (prompt,) = read_prompts(run.data, run.model.path, run.data.path)  # as an evaluation reads its file
    assert prompt.text == "What is 1 + 1? Go."
    assert prompt.token_ids == tuple(tokenizer(run.model.path)("What is 1 + 1? Go.")["input_ids"])
    assert list(VStarTable.open(run.table_dir, contract_of(run)).rewards()) == [prompt.uid]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (['data.suffix=" Go."'], "1 of 1 prompts of {source} are no question with ' Go.' behind it; the first, row 1"),
        (
            ['data.suffix="What is 1 + 1?"'],
            "1 of 1 prompts of {source} are no question with 'What is 1 + 1?' behind it",
        ),
        (["model.path={chat}"], "drawn from the text of each prompt alone, but the chat template of {chat} makes '"),
    ],
)
def test_an_import_of_prompts_that_the_run_would_not_ask_is_refused(
    settings: list[str], message: str, stage1: Command, tmp_path: Path, tied_llama: Path
) -> None:
    names = {"chat": tied_llama, "source": tmp_path / "stage1.parquet"}
    status, _, error = stage1(_stage1(), settings=[setting.format(**names) for setting in settings])
    assert status == 2 and message.format(**names) in error.replace("\n", " ")
    assert not (tmp_path / "run").exists() and not (tmp_path / "prompts").exists()


def test_other_responses_of_the_same_prompts_are_refused_and_nothing_is_written(
    stage1: Command, cfg: RunConfig
) -> None:
    assert stage1(_stage1())[0] == 0
    before = sorted(cfg.table_dir.glob("shard-*"))
    status, _, error = stage1(_stage1(response_1="4</s>", response_3="2", eval_3=1.0))
    assert status == 2
    assert "has other responses where 1 of 4 would go, for example response_1 of 'What is 1 + 1?'" in error
    assert sorted(cfg.table_dir.glob("shard-*")) == before


def test_duplicates_of_published_rows_are_imported_once_and_counted(stage1: Command, cfg: RunConfig) -> None:
    for imported, there in ((3, 0), (0, 3)):
        status, report, error = stage1(_stage1(), _stage1(response_0="1"), _stage1())
        assert status == 0, error
        assert f"{imported} imported, {there} were there" in report and "2 of 3: duplicates" in report
    assert read_jsonl(Path(cfg.data.path)) == [{"question": "What is 1 + 1?", "answer": "2"}]
    assert list(VStarTable.open(cfg.table_dir, None).rewards().values()) == [[1.0, 0.0, 1.0]]


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward_model": {"ground_truth": "3"}}, "2 of 2 rows can't be used"),
        ({"prompt": _user("x"), "response_1": "7 " * 9}, "1 of 6 responses exceed sampling.max_response_tokens = 8"),
        ({"prompt": _user("x" * 31)}, "1 of 2 prompts exceed data.max_prompt_tokens = 30"),
        ({"prompt": _user("x"), "reward_model": {"ground_truth": "y"}}, "1 of 2 prompts can't be scored"),
        ({"eval_1": None}, "1 of 2 rows can't be used"),
        ({"eval_1": None}, "row 2: eval_1 is None, expected a finite number"),
        ({"eval_1": math.nan}, "row 2: eval_1 is nan"),
        ({"response_2": None}, "row 2: response_2 is None, expected text"),
        ({"response_7": "2"}, "row 2: eval_7 is None, expected a finite number"),
        ({"eval_8": 1.0}, "row 2: response_8 is None, expected text"),
        ({f"{name}_{i}": None for name in ("response", "eval") for i in range(3)}, "row 2: it has no response_i"),
        ({"response_01": "2", "eval_01": 1.0}, "response_01 has zeros before its number"),
        ({"reward_model": {"ground_truth": ""}}, "ground_truth is ''"),
        ({"prompt": [{"role": "system", "content": "x"}]}, "expected a chat of one user message"),
        ({"prompt": _user(" ")}, "row 2: the user message is ' '"),
    ],
)
def test_an_import_that_is_refused_writes_nothing(
    change: dict[str, Any], message: str, stage1: Command, cfg: RunConfig
) -> None:
    status, _, error = stage1(_stage1(), _stage1(**change))
    assert status == 2 and message in error, error
    assert not Path(cfg.data.path).exists() and not cfg.table_dir.exists()


def test_every_published_pair_is_imported_whatever_the_first_row_has(stage1: Command, cfg: RunConfig) -> None:
    short = _stage1(prompt=_user("x"), response_0=None, eval_0=None, response_2=None, eval_2=None)
    status, report, error = stage1(short, *[_stage1(response_9="2", eval_9=1.0)] * 2)
    assert status == 0, error
    assert "5 imported" in report and "responses left out: 4," in report and "responses a prompt: 1 to 4" in report
    assert columns_of(cfg.table_dir)["sample"].to_pylist() == [1, 0, 1, 2, 9]
    status, report, _ = stage1()
    assert status == 0 and "0 imported, 5 were there" in report
