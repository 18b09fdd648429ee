"""What training costs by three measures, and when its budget ends it or has it evaluated.

- response tokens;
- model FLOPs: `model_flops` of a line of metrics, what the ranks computed, and `generation_flops`, what drawing the
  step's responses needs. That is one forward pass over them as model/flops.py counts one: two FLOPs a weight and token
  that is fed, a prompt once however many responses it gets, attention to what came before, the head at response tokens;
- seconds of the steps without those of evaluation, which looks at a run and does not make it.

Leaves out stage 1, which runs share, what was drawn ahead and never trained, starting, checkpoints, the writing of
metrics and rollouts, and the export.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from astar_megatron.config import BudgetConfig
from astar_megatron.model.flops import drawing_flops
from astar_megatron.types import Prompt
from conversion.families import Model

type Measure = Literal["tokens", "flops", "seconds"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Response tokens, model FLOPs and seconds."""

    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0

    @classmethod
    def of_step(cls, line: Mapping[str, Any]) -> Self:
        """Return what the step of a line of metrics has cost; what it lacks, or has no number for, is 0."""
        seconds = line.get("seconds") or {}
        return cls(
            tokens=line.get("response_tokens") or 0,
            flops=(line.get("model_flops") or 0.0) + (line.get("generation_flops") or 0.0),
            seconds=(seconds.get("total") or 0.0) - (seconds.get("eval") or 0.0),
        )

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            tokens=self.tokens + other.tokens,
            flops=self.flops + other.flops,
            seconds=self.seconds + other.seconds,
        )

    def by(self, measure: Measure) -> float:
        """Return one of the three."""
        return {"tokens": self.tokens, "flops": self.flops, "seconds": self.seconds}[measure]


class Spending:
    """How long training goes on: `num_steps` steps at most, and none after the one that reaches the budget.

    `earlier` are the lines of metrics of the `done` steps that a resumed run has behind it.
    """

    def __init__(self, budget: BudgetConfig, num_steps: int, done: int, earlier: Sequence[Mapping[str, Any]]) -> None:
        limits: dict[Measure, Sequence[float] | None] = {
            "tokens": budget.tokens,
            "flops": budget.flops,
            "seconds": budget.seconds,
        }
        self._amounts: dict[Measure, Sequence[float]] = {name: amounts for name, amounts in limits.items() if amounts}
        self._num_steps = num_steps
        self._before = self._spent = Cost()  # before the last step, and after it
        for line in earlier:
            self.add(line)
        self.done = done

    def steps(self) -> Iterator[int]:
        """Yield the steps that are left, each after the last was added."""
        while not self.ends:
            yield self.done

    def add(self, line: Mapping[str, Any]) -> None:
        """Count a step that was done."""
        self._before, self._spent = self._spent, self._spent + Cost.of_step(line)
        self.done = line["step"] + 1

    @property
    def ends(self) -> bool:
        """Whether no step is left."""
        return self.done >= self._num_steps or bool(self.reached)

    @property
    def reached(self) -> list[str]:
        """In words what of the budget is reached."""
        return [
            f"budget.{measure}: {self._spent.by(measure):.6g} of {amounts[-1]:.6g} after {self.done} steps"
            for measure, amounts in self._amounts.items()
            if self._spent.by(measure) >= amounts[-1]
        ]

    @property
    def has_reached_a_part(self) -> bool:
        """Whether the last step reached an amount where there are several: the policy is to be evaluated then."""
        return any(
            self._before.by(measure) < amount <= self._spent.by(measure)
            for measure, amounts in self._amounts.items()
            for amount in (amounts if len(amounts) > 1 else ())
        )


def generation_flops(model: Model, responses: Iterable[tuple[Prompt, Sequence[int]]]) -> int:
    """Return the model FLOPs of drawing responses of these lengths, in any order of the prompts."""
    by_prompt: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
    for prompt, lengths in responses:
        by_prompt[prompt.token_ids] += lengths
    return sum(drawing_flops(model, len(prompt), lengths) for prompt, lengths in by_prompt.items())
