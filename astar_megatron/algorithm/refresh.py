"""V* that follows the policy: stage 1's estimate, refreshed by the rewards of training's own rollouts.

Of each prompt two numbers: the decayed sum of w = exp(r / beta1) over its samples, and their decayed count. A new
reward multiplies both by `decay` and adds w and 1; V* = beta1 * ln(sum / count). For rewards of 0 and 1 these are the
counts of a Beta distribution of the pass rate, forgotten at the same pace.

Strictly on-policy V* is a baseline: the expected gradient is the same for any, so a fresher one lowers the variance.
What it estimates is no more the value under the reference. A reward enters after its own step: before, V* would depend
on the response it is subtracted from, which biases the gradient.

Leaves out: which prompts are drawn (data/filters.py).
"""

import math
from collections.abc import Iterable, Mapping


class LiveVStar:
    """V* by uid. Without a `decay` it stays what stage 1 found."""

    def __init__(
        self, v_star: Mapping[str, float], samples: Mapping[str, int], beta1: float, decay: float | None
    ) -> None:
        self._first, self._samples, self._beta1, self._decay = v_star, samples, beta1, decay
        self._refreshed: dict[str, tuple[float, float]] = {}  # uid -> ln of the sum of w, count

    def __getitem__(self, uid: str) -> float:
        if uid not in self._refreshed:
            return self._first[uid]
        log_sum, count = self._refreshed[uid]
        return self._beta1 * (log_sum - math.log(count))

    def shift(self, uids: Iterable[str]) -> float:
        """Return the mean of V* now minus V* of stage 1 over `uids`; 0 without a decay."""
        shifts = [self[uid] - self._first[uid] for uid in uids]
        return sum(shifts) / len(shifts)

    def add(self, rewards: Iterable[tuple[str, float]]) -> None:
        """Take in (uid, reward) of rollouts whose step is done; nothing without a decay."""
        if self._decay is None:
            return
        for uid, reward in rewards:
            log_sum, count = self._refreshed.get(uid) or (
                self._first[uid] / self._beta1 + math.log(self._samples[uid]),
                float(self._samples[uid]),
            )
            log_sum, scaled = log_sum + math.log(self._decay), reward / self._beta1
            high = max(log_sum, scaled)
            log_sum = high + math.log(math.exp(log_sum - high) + math.exp(scaled - high))
            self._refreshed[uid] = log_sum, self._decay * count + 1

    def state(self) -> dict[str, list[float]]:
        """Return what was refreshed, ready for JSON."""
        return {uid: list(pair) for uid, pair in self._refreshed.items()}

    def restore(self, state: Mapping[str, list[float]]) -> None:
        """Continue where `state` was taken."""
        self._refreshed = {uid: (float(log_sum), float(count)) for uid, (log_sum, count) in state.items()}
