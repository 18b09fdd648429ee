"""The benchmarks' files: every answer is read, and every gold answer scores 1 under its benchmark's reward."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from samples import write_jsonl

from astar_megatron import config
from astar_megatron.algorithm import rewards
from astar_megatron.config import DataConfig
from astar_megatron.data.benchmarks import BENCHMARKS, SUFFIXES, benchmark_prompts, longest_prompt, read_benchmark
from astar_megatron.data.rows import PromptError

# The problems in a copy of each benchmark as simpleRL-reason and grade-school-math have them.
SIZES = {"gsm8k": 1319, "math500": 500, "minerva": 272, "olympiadbench": 675, "amc23": 40, "aime24": 30}
# Gold answers that do not score 1 under the reward, by the benchmark: line -> why. There is none.
EXCEPTIONS: dict[str, dict[str, str]] = {}


def data_folder(file: str) -> Path:
    folder = Path(os.environ.get("ASTAR_DATA") or Path(__file__).parents[3] / "shared" / "data")
    if not (folder / file).is_file():
        pytest.skip(f"{folder / file} is absent; set ASTAR_DATA to the folder of the benchmark files")
    return folder


def response(reward: str, answer: str) -> str:
    return f"So it is\n#### {answer}" if reward.startswith("gsm8k") else f"So it is $\\boxed{{{answer}}}$."


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_gold_answer_scores_one(name: str) -> None:
    benchmark = BENCHMARKS[name]
    pairs = read_benchmark(name, data_folder(benchmark.file))
    assert len(pairs) == SIZES[name]
    reward = rewards.get(benchmark.reward)
    wrong = {pair.where for pair in pairs if reward(response(benchmark.reward, pair.answer), pair.answer) != 1}
    assert wrong == set(EXCEPTIONS.get(name, {}))
    assert not any(reward(response(benchmark.reward, "no such answer"), pair.answer) for pair in pairs)


@pytest.mark.parametrize(("name", "field"), [("gsm8k", "answer"), ("math500", "solution"), ("minerva", "solution")])
def test_every_gold_solution_scores_one(name: str, field: str) -> None:
    """The whole solution as the response, as the data sets have it."""
    benchmark = BENCHMARKS[name]
    folder = data_folder(benchmark.file)
    solutions = [json.loads(line)[field] for line in (folder / benchmark.file).read_text("utf-8").splitlines()]
    reward = rewards.get(benchmark.reward)
    pairs = read_benchmark(name, folder)
    wrong = {p.where for p, text in zip(pairs, solutions, strict=True) if reward(text, p.answer) != 1}
    assert wrong == set()


@pytest.mark.parametrize("name", ["gsm8k_strict", "gsm8k_flexible", "last_number"])
def test_every_gold_answer_of_the_training_set_scores_one(name: str) -> None:
    file = data_folder("gsm8k_train.jsonl") / "gsm8k_train.jsonl"
    answers = [json.loads(line)["answer"] for line in file.read_text("utf-8").splitlines()]
    assert len(answers) == 7473
    reward = rewards.get(name)
    finals = [answer.rpartition("#### ")[2] for answer in answers]
    assert [solution for solution, final in zip(answers, finals, strict=True) if reward(solution, final) != 1] == []


@pytest.mark.parametrize("name", ["math500", "aime24", "amc23"])
def test_math_verify_agrees_on_gold_answers(name: str) -> None:
    pytest.importorskip("math_verify", reason="needs the package math-verify")
    pairs = read_benchmark(name, data_folder(BENCHMARKS[name].file))[:120]
    reward = rewards.get("math_verify")
    assert [pair.answer for pair in pairs if reward(response("math", pair.answer), pair.answer) != 1] == []


@pytest.mark.parametrize(
    ("name", "row", "answer"),
    [
        ("gsm8k", {"question": "q", "answer": "so 6*200=1,200\n#### 1,200"}, "1200"),
        ("gsm8k", {"question": "q", "answer": "1200"}, "1200"),
        ("gsm8k", {"question": "q", "answer": 1200}, "1200"),
        ("math500", {"problem": "q", "answer": r"\frac{1}{2}", "solution": r"\boxed{1}"}, r"\frac{1}{2}"),
        ("minerva", {"problem": "q", "solution": r"\boxed{1} so \boxed{4.5e33} erg"}, "4.5e33"),
        ("olympiadbench", {"question": "q", "final_answer": ["$3 n$"]}, "3 n"),
        ("olympiadbench", {"question": "q", "final_answer": ["1", "$2$"]}, "1, 2"),
        ("amc23", {"problem": "q", "answer": 27.0}, "27"),
        ("amc23", {"problem": "q", "answer": "27.0"}, "27"),
        ("aime24", {"problem": "q", "answer": "025"}, "25"),
    ],
)
def test_an_answer_is_taken_without_what_belongs_to_the_file_s_format(
    name: str, row: dict[str, object], answer: str, tmp_path: Path
) -> None:
    (tmp_path / BENCHMARKS[name].file).write_text(json.dumps(row) + "\n")
    (pair,) = read_benchmark(name, tmp_path)
    assert (pair.question, pair.answer) == ("q", answer)


@pytest.mark.parametrize("name", ["amc23", "aime24"])
@pytest.mark.parametrize("text", ["25", "025", "25.0", "+25"])
def test_a_contest_s_integer_is_right_in_any_form(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / BENCHMARKS[name].file).write_text(json.dumps({"problem": "q", "answer": text.strip("+")}) + "\n")
    (pair,) = read_benchmark(name, tmp_path)
    reward = rewards.get(BENCHMARKS[name].reward)
    assert all(reward(response("math", form), pair.answer) == 1 for form in ("25", "025", "25.0", "+25"))
    assert not any(reward(response("math", form), pair.answer) for form in ("26", "25.5", "-25", "2 5x", ""))


@pytest.mark.parametrize(
    ("name", "rows", "words"),
    [
        (
            "math500",
            [{"problem": "q", "answer": "1"}, {"problem": "q"}, {"problem": "", "answer": "1"}, {"answer": "1"}],
            r"(?s)3 of 4 rows.*line 2: no field 'solution'.*line 3.*empty.*line 4",
        ),
        ("aime24", [{"problem": "q", "answer": "x"}], "1 of 1 rows"),
        (
            "amc23",
            [{"problem": "q", "answer": "1"}, {"problem": "p", "answer": "1"}, *[{"problem": "q", "answer": "2"}] * 2],
            r"(?s)2 of 4 rows.*line 3: the question of line 1 again; keep one.*line 4",
        ),
        ("amc23", None, r"eval\.folder: amc23 is read from amc23\.jsonl"),
        ("aime25", None, r"no benchmark 'aime25'; there are gsm8k, math500"),
    ],
)
def test_a_benchmark_that_cannot_be_read_is_refused(
    name: str, rows: list[dict[str, str]] | None, words: str, tmp_path: Path
) -> None:
    if rows is not None:
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    with pytest.raises(PromptError, match=words):
        read_benchmark(name, tmp_path)


def test_each_row_is_a_prompt_and_none_is_cut(tmp_path: Path, model_folder: Callable[..., str]) -> None:
    write_jsonl(tmp_path / "amc23.jsonl", [{"problem": f"How {word}?", "answer": 3} for word in ("many", "much")])
    model = model_folder()
    wide = DataConfig(path="none", max_prompt_tokens=1000)
    prompts = benchmark_prompts("amc23", tmp_path, wide, model)
    assert [prompt.text for prompt in prompts] == [f"How {word}?{SUFFIXES['math']}" for word in ("many", "much")]
    length = longest_prompt("amc23", tmp_path, wide, model)
    assert length == max(len(prompt.token_ids) for prompt in prompts)
    assert benchmark_prompts("amc23", tmp_path, DataConfig(path="none", max_prompt_tokens=length), model) == prompts
    with pytest.raises(PromptError, match=rf"[12] of 2 prompts of amc23 exceed .* raise it to {length}"):
        benchmark_prompts("amc23", tmp_path, DataConfig(path="none", max_prompt_tokens=length - 1), model)


@pytest.mark.parametrize(("run", "kind"), [("gsm8k_qwen2.5_1.5b", "gsm8k"), ("math_qwen2.5_1.5b", "math")])
def test_the_papers_runs_train_with_the_suffix_and_the_reward_of_their_benchmark(run: str, kind: str) -> None:
    cfg = config.load(Path(__file__).parents[2] / "configs" / f"{run}.yaml")
    benchmark = BENCHMARKS["gsm8k" if kind == "gsm8k" else "math500"]
    assert cfg.data.suffix == SUFFIXES[kind] == benchmark.suffix
    assert cfg.reward.name == benchmark.reward
