"""PROGRAM: `astar data` prepares prompts as the JSONL that `data.path` reads; no torch is needed.

Every row has a question and an answer that the data set's reward can read. What can't be used is counted and refused,
or left out where the user says so; exact duplicates are left out and counted; nothing is repaired in silence.
"""

import json
import os
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from astar_megatron.algorithm import rewards
from astar_megatron.config import RewardConfig
from astar_megatron.data.arithmetic import arithmetic, countdown, jsonl, multiply, write_jsonl
from astar_megatron.data.benchmarks import BENCHMARKS, RENAME, Benchmark
from astar_megatron.data.files import refusal_at
from astar_megatron.data.nested import refuse_nested
from astar_megatron.data.rows import Pair, Problems, PromptError, answer_field, pairs_of, without_duplicates
from astar_megatron.data.sources import RowSource, refuse_no_file, refuse_other, rows_of
from astar_megatron.rollout.scoring import Scorer
from astar_megatron.run.tracking import Screen
from astar_megatron.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """A data set that this program knows: where the hub has it; its fields, suffix and reward are the benchmark's."""

    hub: str
    subset: str | None
    benchmark: Benchmark


_SOURCES = {
    "gsm8k": _Source(hub="openai/gsm8k", subset="main", benchmark=BENCHMARKS["gsm8k"]),
    "math": _Source(hub="DigitalLearningGmbH/MATH-lighteval", subset=None, benchmark=BENCHMARKS["math500"]),
}
_GENERATED = {"countdown": countdown, "arithmetic": arithmetic, "multiply": multiply}


def generate(kind: str, out: str, *, rows: int, seed: int) -> None:
    """Write `rows` problems that this project makes itself."""
    _check_out(out)
    problems = _GENERATED[kind](rows, seed)
    refuse_other("--out", Path(out), jsonl(problems))
    write_jsonl(out, problems)
    Screen().table(f"{kind}, seed {seed}", _settings(out, len(problems), kind, suffix=""))


def prepare(
    kind: str,
    source: str | None,
    out: str,
    *,
    split: str | None = None,
    subset: str | None = None,
    question: str = "question",
    answer: str = "answer",
    reward: str | None = None,
    drop: bool = False,
) -> None:
    """Write the questions and answers of a data set: files of this machine, else of the hub.

    Of a data set that is known by its `kind` all but `split` and `drop` is known.
    """
    suffix = known_subset = None
    read: Callable[[Mapping[str, Any]], str] = answer_field(answer, "set --answer-field")
    remedy = "set --question-field"
    if known := _SOURCES.get(kind):
        source, known_subset, benchmark = source or known.hub, known.subset, known.benchmark
        question, read, suffix, reward = benchmark.question, benchmark.answer, benchmark.suffix, benchmark.reward
        remedy = f"{RENAME}, or use astar data jsonl with --question-field and --answer-field"
    if source is None:
        raise PromptError(f"astar data {kind}: name the file, the folder or the data set of the hub")
    _check_out(out, source)  # before all rows are read, and tried on a reward
    problems = Problems(source)
    asked = RowSource(source, kind, subset, split)
    rows = rows_of(asked, problems, known_subset=known_subset)
    total = len(rows) + problems.count
    pairs = pairs_of(rows, question, read, problems, remedy=remedy)
    if not (pairs or known):
        refuse_nested(rows, question, answer, asked)
    if reward:
        pairs = _readable(pairs, reward, problems)
    kept = [pairs[i] for i in without_duplicates(pairs, [pair.question for pair in pairs], problems)]
    if not drop:
        problems.refuse(total)
    if not kept:
        raise PromptError(problems.message(total))
    written = [{"question": pair.question, "answer": pair.answer} for pair in kept]
    refuse_other("--out", Path(out), jsonl(written))
    write_jsonl(out, written)
    table = _settings(out, len(kept), reward, suffix)
    if len(kept) < total:
        table.insert(1, ("left out", f"{total - len(kept)} of {total} rows: duplicates, or not usable"))
    screen = Screen()
    screen.table(source, table)
    if problems.count:
        screen.say(problems.message(total))


def _readable(pairs: list[Pair], reward_name: str, problems: Problems) -> list[Pair]:
    """The pairs whose answer the reward can read; the others go to `problems`."""
    kept = []
    for pair, (value, reason) in zip(pairs, _tried(pairs, reward_name), strict=True):
        if value is None:
            problems.add(pair.where, f"the reward {reward_name} can't read the answer: {reason}")
        else:
            kept.append(pair)
    return kept


def _tried(pairs: list[Pair], reward_name: str) -> Iterable[tuple[float | None, str]]:
    """What the reward gives an empty response to each pair; one of the user's own runs away from this process."""
    if ":" not in reward_name:
        reward = rewards.get(reward_name)
        return (rewards.judge(reward, "", pair.answer) for pair in pairs)
    prompts = [Prompt(uid=pair.where, token_ids=(), text=pair.question, answer=pair.answer) for pair in pairs]
    with Scorer(RewardConfig(name=reward_name)) as scorer:
        return scorer.try_on(prompts)


def _settings(out: str, count: int, reward: str | None, suffix: str | None) -> list[tuple[str, str]]:
    """What was written, and the keys of a configuration that go with it."""
    rows = [("prompts", str(count)), ("data.path", out)]
    if suffix is not None:
        word = json.dumps(suffix)  # as YAML has it
        rows += [("data.suffix", word), ("on a command line", f"--set {shlex.quote(f'data.suffix={word}')}")]
    return [*rows, ("reward.name", reward)] if reward else rows


def _check_out(out: str, source: str | None = None) -> None:
    """Raises PromptError where `out` is what the rows come from, by any link, or no file can be written there."""
    if problem := refusal_at(Path(os.path.realpath(out)).parent):
        raise PromptError(f"--out: {problem}; choose another path")
    path, place = Path(out), Path(source or out)
    if source and path.is_file() and place.exists():
        for file in [place, *place.rglob("*")] if place.is_dir() else [place]:
            if file.exists() and file.samefile(path):
                raise PromptError(f"--out: {out} is {file}, which the rows come from; choose another path")
    refuse_no_file("--out", path)
