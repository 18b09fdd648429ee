"""V* of many prompts at once, with its error, its interval and what it was made from.

Legend: P prompts, N samples of a prompt, R rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch

from astar_megatron.algorithm import value


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimates:
    """V* of P prompts, one entry a prompt in each column.

    `low` and `high` are the ends of the interval: exact (Clopper and Pearson, through V*) where all rewards of the
    table are 0 or 1; otherwise V* minus and plus its standard error times the normal quantile, which is approximate,
    and infinite for a single sample.
    """

    uids: list[str]
    v_star: np.ndarray  # [P] float64
    error: np.ndarray  # [P] standard error by the delta method; NaN for a single sample
    low: np.ndarray  # [P]
    high: np.ndarray  # [P]
    samples: np.ndarray  # [P] int64, that count
    mean: np.ndarray  # [P] of the rewards
    least: np.ndarray  # [P] reward
    most: np.ndarray  # [P] reward
    tokens: np.ndarray  # [P] int64, of the responses that count

    @property
    def width(self) -> np.ndarray:
        """[P], of the interval."""
        return self.high - self.low

    def by_uid(self) -> dict[str, float]:
        """Return V* by uid."""
        return dict(zip(self.uids, self.v_star.tolist(), strict=True))

    def samples_by_uid(self) -> dict[str, int]:
        """Return how many samples count, by uid."""
        return dict(zip(self.uids, self.samples.tolist(), strict=True))


def estimate(
    uids: Sequence[str],
    rewards: np.ndarray,
    tokens: np.ndarray,
    starts: np.ndarray,
    counts: np.ndarray,
    beta1: float,
    *,
    level: float,
    bias_correction: bool,
) -> Estimates:
    """Return the estimates of prompts whose samples are rewards[starts[p] : starts[p] + counts[p]], counts >= 1.

    `rewards`, `tokens` [R]: all of the table, which decide whether rewards are 0 or 1 only.
    """
    shape = len(uids)
    floats = {name: np.empty(shape) for name in ("v_star", "error", "mean", "least", "most", "bias")}
    spent = np.empty(shape, np.int64)
    for count in np.unique(counts):  # prompts with equally many samples form one [P, N] array
        which = np.flatnonzero(counts == count)
        rows = starts[which, None] + np.arange(count)
        drawn = torch.from_numpy(rewards[rows])  # [P, N]
        floats["v_star"][which] = value.v_star(drawn, beta1).numpy()
        floats["error"][which] = value.standard_error(drawn, beta1).numpy()
        floats["bias"][which] = value.bias_correction(drawn, beta1).numpy()
        floats["mean"][which] = drawn.mean(dim=-1).numpy()
        floats["least"][which] = drawn.amin(dim=-1).numpy()
        floats["most"][which] = drawn.amax(dim=-1).numpy()
        spent[which] = tokens[rows].sum(axis=-1, dtype=np.int64)
    bias = floats.pop("bias")
    if bool(((rewards == 0) | (rewards == 1)).all()):
        low, high = _exact_interval(np.rint(floats["mean"] * counts).astype(np.int64), counts, beta1, level)
    else:
        reach = NormalDist().inv_cdf((1 + level) / 2) * np.where(counts > 1, floats["error"], np.inf)
        low, high = floats["v_star"] - reach, floats["v_star"] + reach
    if bias_correction:
        floats["v_star"] = floats["v_star"] + bias
    return Estimates(uids=list(uids), **floats, low=low, high=high, samples=np.array(counts, np.int64), tokens=spent)


def _exact_interval(k: np.ndarray, n: np.ndarray, beta1: float, level: float) -> tuple[np.ndarray, np.ndarray]:
    """[P] each; k passes of n. Each pair (k, n) is computed once."""
    pairs, place = np.unique(np.stack([k, n]), axis=1, return_inverse=True)
    if not pairs.size:
        return np.empty(0), np.empty(0)
    ends = value.pass_rate_interval(torch.from_numpy(pairs[0]), torch.from_numpy(pairs[1]), level)
    low, high = (value.v_star_from_pass_rate(end, 1.0, beta1).numpy()[place.reshape(-1)] for end in ends)
    return low, high
