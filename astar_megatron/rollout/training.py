"""What training is fed with: a batch of rollouts a version of the policy."""

from collections import deque
from collections.abc import Callable, Sequence
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
    draw: Draw
    prompts_before: dict[str, Any]  # state of the prompts before this batch was taken of them


class TrainingRollouts:
    """The batches of `versions`, in order, of `group_size` responses a prompt.

    Each may be drawn by weights up to `rollout.max_staleness` versions old, and is asked for so far ahead that the
    engines never wait for training. 0 is on-policy: a batch is asked for when its version has been published.
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
    ) -> None:
        self._source, self._prompts, self._run_seed, self._group_size = source, prompts, run_seed, group_size
        self._versions, self._max_staleness = versions, rollout.max_staleness
        self._drains = rollout.update == "drain"
        self._asked: deque[_Batch] = deque()  # and not taken

    def take(self, version: int, span: Callable[[str], AbstractContextManager[None]]) -> list[Rollout]:
        """Return the scored batch that this version is trained on; the engines must have its weights.

        `span` times "generate" and "score", what generation did not hide. Raises what engines and reward raise.
        """
        with span("generate"):
            for ahead in range(version + len(self._asked), min(version + self._max_staleness + 1, self._versions.stop)):
                before = self._prompts.state()
                asked = training_requests(self._run_seed, ahead, self._prompts.take(), self._group_size)
                draw = self._source.ask(asked)
                self._asked.append(_Batch(draw=draw, prompts_before=before))
            draw = self._asked.popleft().draw
            draw.wait_for_engines()
        with span("score"):
            rollouts = draw.rollouts()
        first = min(rollout.first_version for rollout in rollouts)
        last = max(rollout.last_version for rollout in rollouts)
        if first < version - self._max_staleness or last > version:
            raise AssertionError(
                f"rollouts of versions {first} to {last} for version {version}, expected none older than by "
                f"{self._max_staleness}, and none of later weights"
            )
        return rollouts

    def while_publishing(self) -> AbstractContextManager[None]:
        """Return what weights are published in: with `rollout.update: drain` no response is on its way then."""
        return self._source.drained() if self._drains else nullcontext()

    def state(self) -> dict[str, Any]:
        """Return where the prompts go on, ready for JSON: what was asked for and not taken is asked for again."""
        return self._asked[0].prompts_before if self._asked else self._prompts.state()
