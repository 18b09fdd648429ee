"""The guides, each top folder's README.md: what they name exists, their commands parse, their Python runs."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import config_page
import pytest
import samples
import test_train
import torch
import typer

from astar_megatron import cli, config
from astar_megatron.algorithm import rewards
from astar_megatron.algorithm.objective import Objective, ResponseTokens
from astar_megatron.data.benchmarks import BENCHMARKS
from astar_megatron.run import steps
from astar_megatron.types import Prompt

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("configs", "astar_megatron", "conversion", "examples", "tests", "slurm")
GUIDES = [ROOT / "README.md", *(ROOT / folder / "README.md" for folder in FOLDERS)]
PAGES = [*GUIDES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
PAGES += [ROOT / f"examples/{name}.md" for name in ("BFLOAT16", "COMPARING", "OWN", "PAPER", "SCALING")]
PAGES += [ROOT / "astar_megatron/launch/README.md"]
SYSTEM, CONVERSION, CONFIGS = (ROOT / folder / "README.md" for folder in ("astar_megatron", "conversion", "configs"))
MODEL = "runs/models/smollm2-135m-instruct"

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language; "" is none."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [body for name, body in fences if name == language]


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def paragraphs(text: str) -> Iterator[str]:
    """Paragraphs and items of lists; no tables, no headings."""
    for part in re.split(r"\n\s*\n|\n(?=- |\d+\. )", prose(text)):
        if part.strip() and not part.lstrip().startswith(("|", "#")):
            yield part.strip()


# --- short and readable


def test_the_root_is_one_screen() -> None:
    lines = text_of(GUIDES[0]).splitlines()
    assert len(lines) <= 60
    assert [line for line in lines if len(line) > 120] == []


@each_page
def test_no_paragraph_is_long(page: Path) -> None:
    assert list(paragraphs("# a\n\none\ntwo\n- three\n\n| four |\n\n```\nfive\n```\n")) == ["one\ntwo", "- three"]
    assert [part for part in paragraphs(text_of(page)) if len(part.split()) > 90] == []


@each_page
def test_lines_other_than_rows_of_tables_fit_a_screen(page: Path) -> None:
    lines = prose(text_of(page)).partition(config_page.MARK)[0].splitlines()
    assert [line for line in lines if len(line) > 120 and not line.startswith("|")] == []


# --- links and names


def problem_of(link: str, page: Path) -> str | None:
    path, _, anchor = link.partition("#")
    target = page if not path else (page.parent / path).resolve()
    if not target.exists():
        return f"{link}: no such file"
    headings = re.findall(r"^#+ (.*)$", prose(text_of(target)), flags=re.MULTILINE) if anchor else []
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return f"{link}: no such heading" if anchor and anchor not in anchors else None


@each_page
def test_every_link_resolves(page: Path) -> None:
    assert problem_of("nowhere.md", page) and problem_of("#nowhere", page)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", prose(text_of(page))) if "://" not in link]
    assert [problem for link in links if (problem := problem_of(link, page))] == []


def test_the_root_links_to_every_folders_guide() -> None:
    assert {f"{folder}/README.md" for folder in FOLDERS} <= set(re.findall(r"\]\((.*?)\)", text_of(GUIDES[0])))


def named_files(page: Path) -> Iterator[tuple[str, Path | None, str]]:
    """(as written, the file, the function behind it) of `folder/file.py`, `name` in a page."""
    for written, name in re.findall(r"`([\w./]+\.py)`(?: `([\w.]+)`)?", prose(text_of(page))):
        places = [page.parent / written, ROOT / written, ROOT / "astar_megatron" / written]
        yield written, next((place for place in places if place.is_file()), None), name


def defined(file: Path) -> set[str]:
    """Functions and classes of a module, and methods as Class.method."""
    names = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = (method for method in node.body if isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef))
            names |= {f"{node.name}.{method.name}" for method in methods}
    return names


@each_page
def test_every_file_and_function_that_is_named_exists(page: Path) -> None:
    new = {"my_reward.py", "astar_megatron/algorithm/reinforce.py"}  # the reader's own
    assert page != SYSTEM or len([name for _, _, name in named_files(page) if name]) >= 15  # the hops
    for written, file, name in named_files(page):
        assert written in new or file is not None, f"{written}: no such file"
        assert not (file and name) or name in defined(file), f"{written} has no {name}"


# --- commands and keys


def commands(page: Path) -> list[list[str]]:
    """The words of every `astar` command line of a page, without those before."""
    lines = "\n".join([*blocks(text_of(page), ""), *re.findall(r"`([^`\n]+)`", prose(text_of(page)))])
    lines = re.sub(r"\s# .*$|\\\n", "", lines, flags=re.MULTILINE)  # comments, and lines that go on
    command = (
        r"^.*?(?:^|\.venv/bin/| )astar "
        r"((?:data|sweep|train|eval|export|plan|launch|jobs|compare|scale|convert|doctor) .+)$"
    )
    return [shlex.split(line) for line in re.findall(command, lines, re.MULTILINE)]


def parse(words: list[str]) -> dict[str, Any]:
    """Return the arguments of a command line as the command line's own parser reads it; it raises otherwise."""
    command, rest = typer.main.get_command(cli.app), words
    context = command.make_context("astar", list(rest))
    while hasattr(command, "commands"):
        command, rest = command.commands[rest[0]], rest[1:]  # type: ignore[attr-defined]
        context = command.make_context("astar", list(rest), parent=context)
    return context.params


@each_page
def test_every_command_line_parses_and_its_keys_exist(page: Path) -> None:
    with pytest.raises(Exception, match="--nowhere"):
        parse(["sweep", "--config", "x", "--nowhere"])
    for words in commands(page):
        arguments = parse(words)
        file = arguments.get("config_file")
        if file is not None and str(file) != "FILE":
            config.load(ROOT / file, arguments.get("overrides") or ())
        assert set(filter(None, (arguments.get("benchmarks") or "").split(","))) <= set(BENCHMARKS)


def test_the_guides_have_commands() -> None:
    assert sum(len(commands(page)) for page in PAGES) > 30
    programs = {words[0] for page in PAGES for words in commands(page)}
    known = {"data", "sweep", "train", "eval", "export", "compare", "scale"}
    assert programs == known | {"convert", "doctor", "launch", "jobs", "plan"}


@each_page
def test_every_target_of_make_exists(page: Path) -> None:
    targets = re.findall(r"^([\w-]+):", text_of(ROOT / "Makefile"), flags=re.MULTILINE)
    text = "\n".join([*blocks(text_of(page), ""), *re.findall(r"`([^`\n]+)`", prose(text_of(page)))])
    assert set(re.findall(r"^make ([\w-]+)", text, flags=re.MULTILINE)) <= set(targets)


@each_page
def test_every_key_that_is_named_exists(page: Path) -> None:
    keys = set(config.keys())
    sections = "|".join(sorted({key.partition(".")[0] for key in keys if "." in key}))
    named = re.findall(rf"`((?:{sections})\.\w+)(?:[=: ][^`]*)?`", prose(text_of(page)))
    assert page != SYSTEM or len(named) > 20
    assert [key for key in named if key not in keys and not key.endswith((".json", ".py"))] == []


def test_the_page_of_keys_is_made_of_the_configuration() -> None:
    text = text_of(CONFIGS)
    assert config_page.page(text) == text, "configs/README.md: run tests/config_page.py"
    assert set(re.findall(r"^\| `([\w.]+)` \|", text.partition(config_page.MARK)[2], flags=re.MULTILINE)) == set(
        config.keys()
    )


def test_every_key_says_what_it_means() -> None:
    for key, section in config.keys().items():
        assert section.model_fields[key.rpartition(".")[2]].description, key


def test_the_smallest_configuration_of_the_page_is_one(tmp_path: Path) -> None:
    (smallest,) = blocks(text_of(CONFIGS), "yaml")
    (tmp_path / "run.yaml").write_text(smallest, encoding="utf-8")
    assert config.load(tmp_path / "run.yaml").run_dir == "runs/mine"


def test_the_system_page_explains_every_key_of_a_line_of_metrics() -> None:
    table = text_of(SYSTEM).partition("## Metrics\n")[2].partition("\n## ")[0]
    explained: set[str] = set()
    for cell in re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE):
        names = re.findall(r"`(\w+)`", cell)
        stem = names[0].rpartition("_")[0]
        explained |= {stem + name if name.startswith("_") else name for name in names}
    of_the_loop = {"eval", "generation_flops", "engines_replaced", "timeline", "kept_bytes", "returned_bytes"}
    assert explained == test_train.KEYS | test_train.KEYS_OF_OTHER_METHODS | of_the_loop


def test_the_system_page_names_every_reward() -> None:
    table = text_of(SYSTEM).partition("| `reward.name` |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE)
    assert sorted(name for row in rows for name in re.findall(r"`(\w+)`", row)) == rewards.names()


def test_the_system_page_has_the_file_and_the_fields_of_every_benchmark() -> None:
    table = text_of(SYSTEM).partition("| `eval.benchmarks` |")[2].partition("\n\n")[0]
    cells = [[cell.strip() for cell in row.strip("| ").split(" | ")] for row in table.splitlines()[2:]]
    rows = [re.findall(r"`([^`]+)`", " ".join([*row[:3], *row[4:6]])) + row[6:] for row in cells]
    asked = " Let's think step by step and output the final answer "
    assert rows == [
        [name, of.file, of.question, of.suffix.removeprefix(asked), of.reward, str(of.num_samples)]
        for name, of in BENCHMARKS.items()
    ]
    assert asked.strip() in text_of(SYSTEM) and all(of.suffix.startswith(asked) for of in BENCHMARKS.values())
    for name, _, _, answer, *_ in cells:
        field = re.findall(r"`(\w+)`", answer)[0]
        read = BENCHMARKS[name.strip("`")].answer
        assert read({field: ["27"] if "list" in answer else "27.0" if "whole" in answer else "27"}) == "27"
        if "else" in answer:
            assert read({"solution": r"\boxed{1}, so \boxed{27}"}) == "27"


# --- the Python in them


def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: str) -> None:
    (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


def test_the_reward_of_the_page_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = next(block for block in blocks(text_of(SYSTEM), "python") if "def short_and_right" in block)
    module(tmp_path, monkeypatch, "my_reward", code)
    reward = rewards.get("my_reward:short_and_right")
    assert [reward(response, "7") for response in ("it is 7", "it is 8", "", "so" * 200 + " 7")] == [1.0, 0.0, 0.0, 0.8]


def test_the_method_of_the_page_is_an_objective(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, chosen, *_ = [block for block in blocks(text_of(SYSTEM), "python") if "Reinforce" in block]
    module(tmp_path, monkeypatch, "reinforce_of_the_page", code)
    import reinforce_of_the_page  # pyright: ignore[reportMissingImports]

    assert ast.parse(chosen)
    prompt = Prompt(uid="a", token_ids=(1, 2), text="What is 1 + 1?", answer="2")
    objective: Objective = reinforce_of_the_page.Reinforce({"a": 0.25})
    drawn = [samples.rollout(prompt, reward=1.0), samples.rollout(prompt, reward=None)]
    batch = steps.batch_of(drawn, objective, version=0)
    logprobs = torch.tensor([-1.0, -2.0, -3.0, -4.0], requires_grad=True)
    tokens = ResponseTokens(
        logprobs=logprobs,
        reference_logprobs=logprobs.detach(),
        lengths=(2, 2),
        sum_tokens=lambda values: values.view(2, 2).sum(1),
    )
    losses = objective.loss(tokens, batch.columns)
    losses.sum().backward()
    assert losses.tolist() == [2.25, -1.75]  # -(1 - 0.25) * -3, -(0 - 0.25) * -7
    assert logprobs.grad is not None and logprobs.grad.tolist() == [-0.75, -0.75, 0.25, 0.25]
    stats = samples.STATS
    health = steps.health_of(objective, drawn[:1], batch, stats, 1)
    line = steps.metrics_of(0, drawn[:1], health, stats, 4, dict.fromkeys(("generate", "publish", "total"), 1.0))
    assert "log-ratio +1.00" in steps.line_of(line, 1)
    objective.learn(drawn, health)
    objective.restore(objective.state())


def test_the_library_page_runs(
    tied_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = text_of(CONVERSION)
    monkeypatch.chdir(tmp_path)
    (tmp_path / MODEL).parent.mkdir(parents=True)
    (tmp_path / MODEL).symlink_to(tied_llama)
    outputs = []
    for block in blocks(text, "python"):
        code = block.replace("tensor=3", "tensor=2")  # this model's heads
        exec(compile(code, str(CONVERSION), "exec"), {})
        outputs.append(capsys.readouterr().out)
    assert "the same " in outputs[0] and blocks(text, "text") == [outputs[1]] and "copies from 4 ranks" in outputs[2]
