"""The paper's benchmarks: where each keeps question and answer, its prompt suffix and its reward.

The files are the user's (folder `eval.folder`); none ships with this project. An answer is taken as it is but for what
belongs to the file's format and not to the answer: dollar signs around it, decimals of 27.0, leading zeros of an AIME
answer. No row is left out, and each is a problem of its own: a benchmark's denominator is its number of problems.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from astar_megatron.algorithm.rewards.latex import integer_of, last_boxed
from astar_megatron.config import DataConfig
from astar_megatron.data.prompts import make_prompts, say_control_tokens, say_unknown_tokens
from astar_megatron.data.rows import Pair, Problems, PromptError, pairs_of, read_rows, text_of
from astar_megatron.types import Prompt

# The paper's own, arXiv 2505.20686.
SUFFIXES = {
    "gsm8k": ' Let\'s think step by step and output the final answer after "####".',
    "math": " Let's think step by step and output the final answer within \\boxed{}.",
}

RENAME = "rename the field"  # no key and no option says where a benchmark has it


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """One benchmark: its file, how a row is read, and how a response is scored."""

    file: str
    answer: Callable[[Mapping[str, Any]], str]
    question: str = "problem"
    suffix: str = SUFFIXES["math"]
    reward: str = "math"
    num_samples: int = 0  # beside the greedy response; avg@32 of amc23 as in the paper


def gsm8k_answer(row: Mapping[str, Any]) -> str:
    """Return what follows "####" of a solution, without commas; an answer by itself as it is. Raises ValueError."""
    number = text_of(row, "answer", RENAME, number=True).rpartition("####")[2].strip().replace(",", "")
    if not number:
        raise ValueError("field 'answer' ends in \"####\"; expected a number behind it")
    return number


def math_answer(row: Mapping[str, Any]) -> str:
    """Return the field `answer`, else the last \\boxed{...} of the field `solution`. Raises ValueError."""
    if "answer" in row:
        return text_of(row, "answer", RENAME, number=True)
    boxed = last_boxed(text_of(row, "solution", RENAME))
    if boxed is None or not boxed.strip():
        raise ValueError("field 'solution' has no closed \\boxed{...}")
    return boxed


def _final_answer(row: Mapping[str, Any]) -> str:
    answers = row.get("final_answer")
    if not isinstance(answers, list) or not all(isinstance(answer, str) and answer.strip() for answer in answers):
        raise ValueError(f"field 'final_answer' is {answers!r}, expected a list of texts")
    return ", ".join(answer.strip().replace("$", "") for answer in answers)


def _integer(row: Mapping[str, Any]) -> str:
    return integer_of(math_answer(row))


BENCHMARKS = {
    "gsm8k": Benchmark(
        file="gsm8k_test.jsonl",
        question="question",
        answer=gsm8k_answer,
        suffix=SUFFIXES["gsm8k"],
        reward="gsm8k_strict",
    ),
    "math500": Benchmark(file="math500.jsonl", answer=math_answer),
    "minerva": Benchmark(file="minerva_math.jsonl", answer=math_answer),
    "olympiadbench": Benchmark(file="olympiadbench.jsonl", question="question", answer=_final_answer),
    "amc23": Benchmark(file="amc23.jsonl", answer=_integer, reward="boxed_integer", num_samples=32),
    "aime24": Benchmark(file="aime24.jsonl", answer=_integer, reward="boxed_integer"),
}


def check_names(names: Sequence[str]) -> None:
    """Raise PromptError for a name that is none, or that comes twice."""
    if unknown := [name for name in names if name not in BENCHMARKS]:
        raise PromptError(f"eval.benchmarks: no benchmark {unknown[0]!r}; there are {', '.join(BENCHMARKS)}")
    if twice := [name for name in names if names.count(name) > 1]:
        raise PromptError(f"eval.benchmarks: {twice[0]} more than once; name each once")


def read_benchmark(name: str, folder: str | Path) -> list[Pair]:
    """Return all questions and answers of a benchmark from its file in `folder`. Raises PromptError."""
    check_names([name])
    benchmark = BENCHMARKS[name]
    source = Path(folder) / benchmark.file
    if not source.is_file():
        raise PromptError(f"eval.folder: {name} is read from {benchmark.file}, which is not in {folder}")
    problems = Problems(source)
    pairs = pairs_of(read_rows(source, problems), benchmark.question, benchmark.answer, problems, remedy=RENAME)
    num_rows, first = len(pairs) + problems.count, dict[str, str]()
    for pair in pairs:  # a repeat is drawn with the same seeds: it would only make the standard error too small
        if (where := first.setdefault(pair.question, pair.where)) != pair.where:
            problems.add(pair.where, f"the question of {where} again; keep one, eval.num_samples draws more")
    problems.refuse(num_rows)
    return pairs


def benchmark_prompts(name: str, folder: str | Path, cfg: DataConfig, model_path: str) -> list[Prompt]:
    """Return the prompts of a benchmark, every row one. Raises PromptError; none is cut to `cfg.max_prompt_tokens`."""
    pairs = read_benchmark(name, folder)
    prompts = make_prompts(pairs, BENCHMARKS[name].suffix, cfg.date, model_path, name)
    longest, limit = max(len(prompt.token_ids) for prompt in prompts), cfg.max_prompt_tokens
    if longest > limit:
        count = sum(len(prompt.token_ids) > limit for prompt in prompts)
        raise PromptError(
            f"eval.benchmarks: {count} of {len(prompts)} prompts of {name} exceed data.max_prompt_tokens = "
            f"{limit}; raise it to {longest}, or leave {name} to `astar eval`, which makes room by itself"
        )
    say_control_tokens(pairs, model_path, name)
    say_unknown_tokens(pairs, prompts, cfg.date, model_path, name)
    return prompts


def longest_prompt(name: str, folder: str | Path, cfg: DataConfig, model_path: str) -> int:
    """Return the tokens of a benchmark's longest prompt. Raises PromptError."""
    prompts = make_prompts(read_benchmark(name, folder), BENCHMARKS[name].suffix, cfg.date, model_path, name)
    return max(len(prompt.token_ids) for prompt in prompts)
