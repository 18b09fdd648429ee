"""Samples of the types that several tests fill in: what a test does not name does not matter to it."""

import json
import math
import os
import resource
import subprocess
import sys
from array import array
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from astar_megatron import config
from astar_megatron.config import RunConfig
from astar_megatron.data.contract import Contract
from astar_megatron.run.scores import Estimate, Evaluation, Measure
from astar_megatron.types import Prompt, Rollout, Span, StepStats

# What no two runs agree on, of a line of metrics: `line | MEASURED` has the rest. And the same where an engine died in
# one of them: its log-probs are of other batches then.
MEASURED = dict.fromkeys(
    ("seconds", "timeline", "tokens_per_second", "peak_memory_bytes", "kept_bytes", "returned_bytes")
)
MEASURED_AFTER_DEATHS = MEASURED | dict.fromkeys(("engines_replaced", "engine_gap", "engine_gap_max"))

# Files that a tokenizer alone can be read from.
TOKENIZERS_OWN = [
    *("spiece.model", "sentencepiece.bpe.model", "tokenizer.model.v3", "tokenizer.4.40.0.json"),
    *("tekken.json", "qwen.tiktoken", "tiktoken.model", "dict.txt", "bpe.codes"),
]

# What launching looks for in a model's folder; it reads none of them.
LAUNCHED = ("config.json", "model.safetensors", "tokenizer.json")

CONTRACT = Contract(
    model_digest="a" * 64,
    tokenizer_digest="b" * 64,
    template_digest="c" * 64,
    temperature=1.0,
    top_p=1.0,
    max_prompt_tokens=256,
    max_response_tokens=1024,
    stop_token_ids=(2,),
    reward="last_number/1",
)

STATS = StepStats(
    loss=0.25,
    grad_norm=2.0,
    grad_norms=(2.0, math.inf),
    learning_rate=1e-6,
    changed_weights=0.125,
    skipped=(1,),
    tokens=4,
    response_tokens=2,
    tokens_per_second=8.0,
    model_flops=1e9,
    mfu=None,
    peak_memory_bytes=(5, 6),
    spans=(
        Span(name="reference", who="ranks", start=0.0, end=0.1),
        Span(name="policy", who="ranks", start=0.1, end=0.5),
    ),
    logprobs=(-1.0,),
    reference_logprobs=(-2.0,),
    token_logprobs=array("f", (-0.25, -0.75)),
    reference_token_logprobs=array("f", (-1.5, -0.5)),
    losses=(0.25,),
)

MEASURE = Measure(
    problems="/data/of/me/problems.jsonl", digest=16 * "a", temperature=1.0, top_p=1.0, max_response_tokens=8
)


def logratio_max(stats: StepStats) -> float:
    """The largest |ln pi - ln pi_ref| of a response (nats): exactly 0 before the first optimiser step."""
    pairs = zip(stats.logprobs, stats.reference_logprobs, strict=True)
    return max(abs(logprob - reference) for logprob, reference in pairs)


def evaluation(mean: float, name: str = "gsm8k") -> Evaluation:
    """Return what a set of problems gave, `mean` of the greedy and of the sampled responses."""
    estimate = Estimate(mean, 0.0125)
    return Evaluation(
        name=name,
        reward="gsm8k_strict",
        prompts=1319,
        num_samples=4,
        greedy=estimate,
        sampled={"avg@4": estimate, "pass@4": Estimate(1.0, float("nan"))},
        truncated=0.25,
        formatted=None,
        measure=MEASURE,
    )


def rollout(prompt: Prompt, **fields: Any) -> Rollout:
    """Return a finished rollout of `prompt`, rewarded with 1, with `fields` in place of the usual ones."""
    usual: dict[str, Any] = {
        "sample": 0,
        "seed": 0,
        "token_ids": (5, 2),
        "text": "2",
        "truncated": False,
        "token_logprobs": (-0.5, -1.0),
        "first_version": 0,
        "last_version": 0,
        "reward": 1.0,
    }
    return Rollout(prompt=prompt, **usual | fields)


def unlike_the_umask(folder: Path) -> list[Path]:
    """Return the files under `folder` that have other rights than the umask gives a new file."""
    (folder / "like this").touch()
    mode = (folder / "like this").stat().st_mode
    (folder / "like this").unlink()
    return [path for path in folder.rglob("*") if path.is_file() and path.stat().st_mode != mode]


@contextmanager
def umask_of(mask: int) -> Iterator[None]:
    """Give this process, and those that it starts, another umask."""
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def output_of(program: str, *arguments: str, **environment: str) -> str:
    """Return what a program in Python prints, in a process of its own; it fails if that does."""
    command, env = [sys.executable, "-c", program, *arguments], os.environ | environment
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """A disk that is full after so many bytes of a file, as far as this process can tell."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def keep_result(name: str, part: str, result: Mapping[str, Any]) -> None:
    """Put what a test measured, as a part, into `benchmarks/results/<name>.json`, where ASTAR_KEEP_RESULTS is set."""
    if os.environ.get("ASTAR_KEEP_RESULTS"):
        file = Path(__file__).parent / "benchmarks" / "results" / f"{name}.json"
        known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        file.write_text(json.dumps(known | {part: result}, indent=1) + "\n", encoding="utf-8")


def run_tree(**sections: Any) -> dict[str, Any]:
    """Return the tree of a valid configuration, of files that are not there, with the keys of `sections` as given."""
    tree: dict[str, Any] = {
        "run_dir": "runs/x",
        "model": {"path": "m"},
        "data": {"path": "d.jsonl"},
        "reward": {"name": "last_number"},
    }
    for name, section in sections.items():
        tree[name] = tree.get(name, {}) | section if isinstance(section, dict) else section
    return tree


def run_config(**sections: Any) -> RunConfig:
    return config.validate(run_tree(**sections))


class Trap:
    """When it is unpickled it makes a folder."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._mark),)


def path_without(program: str) -> str:
    """PATH without the folders that have a program."""
    return os.pathsep.join(folder for folder in os.get_exec_path() if not (Path(folder) / program).exists())
