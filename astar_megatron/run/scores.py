"""What evaluations gave: their numbers, their tables, and the files that keep them.

    {"weights": "9f4c...", "sets": [{"name": "gsm8k", "greedy": {"mean": 0.71, "error": 0.012}, ...}]}

`<run_dir>/eval_step_<step>.json` has all sets of an evaluation in training; its `weights` is null. Of a folder each set
has a file, whose name has a digest of its weights and the set's `key`: eval_9f4c..._3b1d...json,
eval_9f4c..._gsm8k_77ac...json. So a newer evaluation replaces the same measurement of the same weights alone, and
several may run at once.
"""

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from astar_megatron.data.contract import digest_of
from astar_megatron.data.files import without_nan, write_atomic, write_json
from astar_megatron.data.run_folder import STEPS, step_name, step_of
from astar_megatron.data.table_text import markdown_table

OWN_PROMPTS = "prompts"  # the set of a run's own problems; others are benchmarks


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over problems and its standard error (NaN for one problem)."""

    mean: float
    error: float

    def __str__(self) -> str:
        error = "" if math.isnan(self.error) else f" ± {100 * self.error:.2f}"
        return f"{100 * self.mean:.2f}{error}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """Which problems were asked, and how responses to them were drawn."""

    problems: str  # their file, or the folder of benchmarks, as the configuration gave it
    digest: str  # of the problems, their answers and the reward's rule: 16 hexadecimal digits
    temperature: float
    top_p: float
    max_response_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What one set of problems gave."""

    name: str
    reward: str
    prompts: int
    num_samples: int  # a problem, beside the greedy response
    greedy: Estimate  # reward of the greedy response: pass@1 where rewards are 0 and 1
    sampled: dict[str, Estimate]  # "avg@n", "maj@n" where answers can be compared, "pass@1", "pass@2", ..., "pass@n"
    truncated: float  # share of all responses that the token limit cut
    formatted: float | None  # share of all responses that hold an answer in the reward's form; None: not known
    measure: Measure

    @property
    def key(self) -> str:
        """Eight digits of what was measured, wherever its file lies."""
        measured = dataclasses.asdict(self.measure) | {"problems": self.name, "num_samples": self.num_samples}
        return digest_of(measured)[:8]

    @property
    def title(self) -> str:
        """The set's name; of a run's own prompts with that of their file."""
        return f"{self.name} of {Path(self.measure.problems).name}" if self.name == OWN_PROMPTS else self.name

    def rows(self) -> list[tuple[str, str]]:
        """Return what there is to show, in per cent."""
        return [
            ("problems", str(self.prompts)),
            ("greedy", str(self.greedy)),
            *((name, str(estimate)) for name, estimate in self.sampled.items()),
            ("truncated", f"{100 * self.truncated:.2f}"),
            *([("in the asked form", f"{100 * self.formatted:.2f}")] if self.formatted is not None else []),
            ("reward", self.reward),
            ("sampling", self._sampling()),
        ]

    def _sampling(self) -> str:
        measure = self.measure
        drawn = f"temperature {measure.temperature:g}, top_p {measure.top_p:g}, " if self.num_samples else ""
        return f"{drawn}{measure.max_response_tokens} tokens"

    def metrics(self) -> dict[str, Any]:
        """Return the numbers for a line of metrics."""
        sampled = {name: estimate.mean for name, estimate in self.sampled.items()}
        own = {"greedy": self.greedy.mean, "greedy_error": self.greedy.error}
        return own | sampled | {"truncated": self.truncated, "formatted": self.formatted}

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Self:
        """Return the evaluation of its fields in JSON. Raises KeyError or TypeError for others."""
        sampled = {name: _estimate(each) for name, each in fields["sampled"].items()}
        own = {"greedy": _estimate(fields["greedy"]), "sampled": sampled, "measure": Measure(**fields["measure"])}
        return cls(**{**fields, **own})


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """The evaluations of the weights after `step` steps of training."""

    step: int
    evaluations: list[Evaluation]


def markdown(evaluations: Sequence[Evaluation]) -> str:
    """Return the evaluations as a table in Markdown, in per cent with standard errors."""
    columns = list(dict.fromkeys(name for evaluation in evaluations for name, _ in evaluation.rows()))
    cells = ((evaluation.title, dict(evaluation.rows())) for evaluation in evaluations)
    rows = ([title, *(own.get(column, "") for column in columns)] for title, own in cells)
    return markdown_table(["set", *columns], rows) + "\n\nPer cent, with the standard error over the problems.\n"


def name_of(weights: str) -> str:
    """Return what the names of files begin with that are of an evaluation of these weights."""
    return f"eval_{weights[:12]}"


def file_name(name: str, set_name: str) -> str:
    """Return the name, without its ending, of what one set has for itself."""
    return name if set_name == OWN_PROMPTS else f"{name}_{set_name}"


def name_of_step(step: int) -> str:
    """Return what the names of files begin with that are of the evaluation in training after `step` steps."""
    return f"eval_{step_name(step)}"


def write(run_dir: Path, step: int, evaluations: Sequence[Evaluation]) -> None:
    """Write the evaluations of a step, and the same as a table. Raises StorageError."""
    _write(run_dir / f"{name_of_step(step)}.json", None, evaluations)
    write_atomic(run_dir / f"{name_of_step(step)}.md", markdown(evaluations).encode())


def of_step(run_dir: Path, step: int) -> list[Evaluation]:
    """Return the evaluations in training after `step` steps; [] where there was none. Raises ValueError as `kept`."""
    path = run_dir / f"{name_of_step(step)}.json"
    return _read(path)[1] if path.exists() else []


def mean_of_step(run_dir: Path, step: int) -> float | None:
    """Return the greedy score after `step` steps, the mean over the sets; None where there was no evaluation."""
    evaluations = of_step(run_dir, step)
    return statistics.fmean(evaluation.greedy.mean for evaluation in evaluations) if evaluations else None


def keep(run_dir: Path, weights: str, evaluation: Evaluation, responses: Sequence[str] = ()) -> None:
    """Write an evaluation of a folder, a table of all that there are of its weights, and last its responses.

    Raises StorageError, and ValueError for earlier ones that are damaged.
    """
    stem = f"{file_name(name_of(weights), evaluation.name)}_{evaluation.key}"
    _write(run_dir / f"{stem}.json", weights, [evaluation])
    write_atomic(run_dir / f"{name_of(weights)}.md", markdown(kept(run_dir, weights)).encode())
    write_responses(run_dir, stem, responses)


def write_responses(run_dir: Path, stem: str, responses: Sequence[str]) -> None:
    """Write the lines of a file of responses. Raises StorageError."""
    write_atomic(run_dir / f"{stem}.jsonl", "".join(responses).encode())


def kept(run_dir: Path, weights: str) -> list[Evaluation]:
    """Return the evaluations that there are of a folder's weights. Raises ValueError for a file that is damaged."""
    by_set: dict[tuple[str, str], Evaluation] = {}
    for path in sorted(run_dir.glob(f"{name_of(weights)}*.json")):
        evaluated, sets = _read(path)
        if evaluated == weights:
            by_set |= _by_set(sets)
    return list(by_set.values())


def forget(run_dir: Path, first: int) -> None:
    """Remove scores and responses of steps that a run takes again which goes on after `first`, 0 for one that begins.

    Those after `first` steps are of the checkpoint's own weights.
    """
    for path in run_dir.glob(f"eval_{STEPS}*"):
        if not first or step_of(path.name) > first:
            path.unlink()


def weights_digest(record: Mapping[str, Any] | None) -> str | None:
    """Return a digest of all the weights that a conversion.json records, hexadecimal; None where it has none."""
    digests = (record or {}).get("digests")
    return digest_of(digests) if digests else None


def scores_of(run_dir: Path, step: int, weights: str | None) -> list[Scored]:
    """Return what a run's folder says of the weights that training began with, and of those nearest to `step` steps.

    The last are of `step` itself where training evaluated them, or `astar eval` a folder with these `weights`; of a set
    that both measured alike the folder's counts. Raises ValueError for a file that is damaged.
    """
    of_steps = sorted(path for path in run_dir.glob(f"eval_{STEPS}.json") if step_of(path.name) <= step)
    scored = {step_of(path.name): _read(path)[1] for path in {*of_steps[:1], *of_steps[-1:]}}
    if weights is not None and (own := kept(run_dir, weights)):
        scored[step] = list(_by_set([*scored.get(step, []), *own]).values())
    return [Scored(step=number, evaluations=scored[number]) for number in sorted(scored)]


def _by_set(evaluations: Sequence[Evaluation]) -> dict[tuple[str, str], Evaluation]:
    return {(evaluation.name, evaluation.key): evaluation for evaluation in evaluations}


def _write(path: Path, weights: str | None, evaluations: Sequence[Evaluation]) -> None:
    sets = [dataclasses.asdict(evaluation) for evaluation in evaluations]
    write_json(path, without_nan({"weights": weights, "sets": sets}))


def _read(path: Path) -> tuple[str | None, list[Evaluation]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content["weights"], [Evaluation.of(fields) for fields in content["sets"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: no scores of an evaluation: {error!r}; remove it, and evaluate again") from error


def _estimate(fields: Mapping[str, float | None]) -> Estimate:
    return Estimate(*(math.nan if fields[name] is None else float(fields[name] or 0) for name in ("mean", "error")))
