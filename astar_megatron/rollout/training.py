"""What training is fed with: a batch of rollouts a version of the policy."""

import dataclasses
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from astar_megatron.config import RolloutConfig
from astar_megatron.rollout.requests import training_requests
from astar_megatron.rollout.source import Draw, RolloutSource
from astar_megatron.types import Prompt, Rollout


class Prompts(Protocol):
    """The order in which training takes prompts; see data/prompts.py."""

    def take(self) -> Sequence[Prompt]: ...

    def state(self) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    draw: Draw  # of what was not drawn before
    drawn: Mapping[int, Rollout]  # by number in the batch: what was
    prompts_before: dict[str, Any]  # state of the prompts before this batch was taken of them

    def rollouts(self) -> list[Rollout]:
        """Wait for all of it."""
        fresh = iter(self.draw.rollouts())
        count = len(self.drawn) + self.draw.num_asked
        return [self.drawn[number] if number in self.drawn else next(fresh) for number in range(count)]


class TrainingRollouts:
    """The batches of `versions`, in order, of `group_size` responses a prompt.

    Each may be drawn by weights up to `rollout.max_staleness` versions old, and is asked for so far ahead that the
    engines never wait for training. 0 is on-policy: a batch is asked for when its version has been published.
    `drawn` are rollouts that a run which this one continues had asked for and not taken: they are not asked for again.
    """

    def __init__(
        self,
        source: RolloutSource,
        prompts: Prompts,
        rollout: RolloutConfig,
        run_seed: int,
        *,
        versions: range,
        group_size: int = 1,
        drawn: Sequence[Rollout] = (),
    ) -> None:
        self._source, self._prompts, self._run_seed, self._group_size = source, prompts, run_seed, group_size
        self._versions, self._max_staleness = versions, rollout.max_staleness
        self._drains = rollout.update == "drain"
        self._drawn = {rollout.seed: rollout for rollout in drawn}  # a request's seed is its own
        self._asked: deque[_Batch] = deque()  # and not taken

    def take(self, version: int, span: Callable[[str], AbstractContextManager[None]]) -> list[Rollout]:
        """Return the scored batch that this version is trained on; the engines must have its weights.

        A response that could not be scored counts as the lowest reward of the batch, and at most 0: a reward that fails
        on it must not rank it above wrong ones, which may score less than 0.

        `span` times "generate" and "score", what generation did not hide. Raises what engines and reward raise.
        """
        with span("generate"):
            for ahead in range(version + len(self._asked), min(version + self._max_staleness + 1, self._versions.stop)):
                self._asked.append(self._ask(ahead))
            batch = self._asked.popleft()
            batch.draw.wait_for_engines()
        with span("score"):
            rollouts = _counted(batch.rollouts())
        first = min(rollout.first_version for rollout in rollouts)
        last = max(rollout.last_version for rollout in rollouts)
        if first < version - self._max_staleness or last > version:
            raise AssertionError(
                f"rollouts of versions {first} to {last} for version {version}, expected none older than by "
                f"{self._max_staleness}, and none of later weights"
            )
        return rollouts

    def _ask(self, version: int) -> _Batch:
        before = self._prompts.state()
        requests = training_requests(self._run_seed, version, self._prompts.take(), self._group_size)
        drawn = {
            number: rollout
            for number, request in enumerate(requests)
            if (rollout := self._drawn.pop(request.seed, None)) is not None
            and rollout.first_version >= version - self._max_staleness
        }
        draw = self._source.ask(request for number, request in enumerate(requests) if number not in drawn)
        return _Batch(draw=draw, drawn=drawn, prompts_before=before)

    def while_publishing(self) -> AbstractContextManager[None]:
        """Return what weights are published in: with `rollout.update: drain` no response is on its way then."""
        return self._source.drained() if self._drains else nullcontext()

    def state(self) -> dict[str, Any]:
        """Return where the prompts go on, ready for JSON: before those that were asked for and not taken."""
        return self._asked[0].prompts_before if self._asked else self._prompts.state()

    def in_flight(self) -> list[Rollout]:
        """Return what has been drawn and scored of batches that were not taken; see `drawn`."""
        return [rollout for batch in self._asked for rollout in (*batch.drawn.values(), *batch.draw.finished())]


def _counted(rollouts: list[Rollout]) -> list[Rollout]:
    lowest = min((rollout.reward for rollout in rollouts if rollout.reward is not None), default=0.0)
    return [
        dataclasses.replace(rollout, failure_score=min(lowest, 0.0)) if rollout.reward is None else rollout
        for rollout in rollouts
    ]
