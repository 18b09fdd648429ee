"""V* that follows the policy: stage 1's estimate, refreshed by the rewards of training's own rollouts.

Of each prompt two numbers: V* and the decayed count of its samples. A new reward r multiplies the count by `decay`, and
V* becomes beta1 * ln of the mean of exp(V* / beta1), weighing that count, and exp(r / beta1), weighing 1; the count
grows by 1. For rewards of 0 and 1 these are the counts of a Beta distribution of the pass rate, forgotten at the same
pace.

Strictly on-policy V* is a baseline: the expected gradient is the same for any, so a fresher one lowers the variance.
What it estimates is no more the value under the reference. A reward enters after its own step: before, V* would depend
on the response it is subtracted from, which biases the gradient.

Leaves out: which prompts are drawn (data/filters.py).
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any


class LiveVStar:
    """V* by uid. Without a `decay` it stays what stage 1 found."""

    def __init__(
        self, v_star: Mapping[str, float], samples: Mapping[str, int], beta1: float, decay: float | None
    ) -> None:
        self._first, self._samples, self._beta1, self._decay = v_star, samples, beta1, decay
        self._refreshed: dict[str, tuple[float, float]] = {}  # uid -> V*, count
        self._first_digest = ""  # once it was asked for

    def __getitem__(self, uid: str) -> float:
        return self._refreshed[uid][0] if uid in self._refreshed else self._first[uid]

    def shift(self, uids: Iterable[str]) -> float:
        """Return the mean of V* now minus V* of stage 1 over `uids`; 0 without a decay."""
        shifts = [self[uid] - self._first[uid] for uid in uids]
        return sum(shifts) / len(shifts)

    def add(self, rewards: Iterable[tuple[str, float]]) -> None:
        """Take in (uid, reward) of rollouts whose step is done; nothing without a decay."""
        if self._decay is None:
            return
        for uid, reward in rewards:
            before, count = self._refreshed.get(uid) or (self._first[uid], float(self._samples[uid]))
            count *= self._decay
            top = max(before, reward)
            old, new = (before - top) / self._beta1, (reward - top) / self._beta1
            less = (count * math.expm1(old) + math.expm1(new)) / (count + 1)  # E[w] - 1: exact where beta1 is large
            small = less < -0.5  # where it would be rounded to -1, for a tiny decay
            log_mean = math.log((count * math.exp(old) + math.exp(new)) / (count + 1)) if small else math.log1p(less)
            self._refreshed[uid] = top + self._beta1 * log_mean, count + 1

    def state(self) -> dict[str, Any]:
        """Return what was refreshed, from which V* of stage 1 and with which beta1 and decay, ready for JSON."""
        refreshed = {uid: list(pair) for uid, pair in self._refreshed.items()}
        if not refreshed:
            return {}
        return {"beta1": self._beta1, "decay": self._decay, "stage_1": self._digest(), "refreshed": refreshed}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken; without a decay, from stage 1.

        Raises ValueError for a state of another beta1, decay or stage 1.
        """
        if self._decay is None or not state:
            self._refreshed = {}
            return
        for key, name, now in (("beta1", "beta1", self._beta1), ("decay", "refresh_decay", self._decay)):
            if state[key] != now:
                raise ValueError(
                    f"astar.{name}: the checkpoint's V* was refreshed with astar.{name} {state[key]}, this run has "
                    f"{now}; set it as it was, set astar.refresh_decay to null (V* is stage 1's again), or choose a "
                    "new run_dir"
                )
        if state["stage_1"] != self._digest():
            raise ValueError(
                "astar.refresh_decay: the checkpoint's V* was refreshed from other samples of stage 1 than this run "
                "has (sweep.num_samples, sweep.extra_tokens, or another table); set them as they were, set "
                "astar.refresh_decay to null (V* is stage 1's again), or choose a new run_dir"
            )
        self._refreshed = {uid: (float(value), float(count)) for uid, (value, count) in state["refreshed"].items()}

    def _digest(self) -> str:
        """Of V* of stage 1, but for what machines differ in, and the samples behind it."""
        if not self._first_digest:
            rows = sorted((uid, f"{value:.6f}", self._samples[uid]) for uid, value in self._first.items())
            self._first_digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
        return self._first_digest
