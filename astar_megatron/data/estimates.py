"""V* of many prompts at once, with its error, its interval and what it was made from.

Legend: P prompts, N samples of a prompt, R rows.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from astar_megatron.algorithm import value

_ROWS_AT_ONCE = 1 << 19  # 4 MiB of rewards, and about ten arrays as large beside them


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimates:
    """V* of P prompts, one entry a prompt in each column.

    `low` and `high` are the ends of the interval, by the prompt's own samples that count, always finite. Each rule
    covers the true V* of rewards from -1 to 1 with probability `level` or more, for any N and beta1:
    - all 0 or 1, and no reward of any of these prompts below 0: Clopper and Pearson's, through V*. Exact for rewards
      of 0 and 1. It covers for others from 0 to 1 too: V* is at least that of the share of 1 and at most that of the
      share that is not 0, so where it lies outside, one of these two counts is in its tail;
    - all equal to another c: p of the responses, at most what Clopper and Pearson allow after none of N, may have any
      reward of -1 to 1, so V* of (1 - p) at c and p at -1, and of (1 - p) at c and p at 1;
    - otherwise V* where a share sqrt(ln(2 / (1 - level)) / 2N) of the samples, the highest, has reward -1 instead, or
      the lowest 1: the bound of Dvoretzky, Kiefer and Wolfowitz with Massart's constant (Ann. Prob. 18, 1990) for the
      distribution, in which V* is monotone. Never narrower than the pass rate's of as many samples.
    """

    uids: list[str]
    v_star: np.ndarray  # [P] float64
    error: np.ndarray  # [P] standard error by the delta method; NaN for a single sample
    low: np.ndarray  # [P]
    high: np.ndarray  # [P]
    samples: np.ndarray  # [P] int64, that count
    mean: np.ndarray  # [P] of the rewards
    success: np.ndarray  # [P] mean of the rewards, those below 0 taken as 0
    least: np.ndarray  # [P] reward
    most: np.ndarray  # [P] reward
    tokens: np.ndarray  # [P] int64, of the responses that count
    at_beta2: np.ndarray | None = None  # [P] V of the same samples with beta2 in beta1's place, for a method that asks

    @property
    def width(self) -> np.ndarray:
        """[P], of the interval."""
        return self.high - self.low

    def distributions(self) -> dict[str, list[float]]:
        """Return what there is to draw of stage 1 over its prompts, [P] each, by name."""
        return {"stage_1/v_star": self.v_star.tolist(), "stage_1/v_star_width": self.width.tolist()}

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
) -> Estimates:
    """Return the estimates of prompts whose samples are rewards[starts[p] : starts[p] + counts[p]], counts >= 1.

    NaN is the reward of a response that could not be scored: it counts as the lowest of its prompt's, at most 0.
    """
    if not 0 < level < 1:
        raise ValueError(f"estimate: expected a level between 0 and 1, got {level}; 0.95 is usual")
    shape = len(uids)
    binary, low, high = np.empty(shape, bool), np.empty(shape), np.empty(shape)
    floats = {name: np.empty(shape) for name in ("v_star", "error", "mean", "success", "least", "most")}
    spent = np.empty(shape, np.int64)
    for count, which in _of_equal_count(counts):  # [P, N] arrays
        rows = starts[which, None] + np.arange(count)
        prompt = np.broadcast_to(np.arange(len(rows))[:, None], rows.shape)
        drawn = torch.from_numpy(counted(rewards[rows], prompt, len(rows)))  # [P, N]
        floats["v_star"][which] = value.v_star(drawn, beta1).numpy()
        floats["error"][which] = value.standard_error(drawn, beta1).numpy()
        floats["mean"][which] = drawn.mean(dim=-1).numpy()
        floats["success"][which] = drawn.clamp(0, 1).mean(dim=-1).numpy()
        floats["least"][which] = drawn.amin(dim=-1).numpy()
        floats["most"][which] = drawn.amax(dim=-1).numpy()
        binary[which] = ((drawn == 0) | (drawn == 1)).all(dim=-1).numpy()
        low[which], high[which] = _interval_of_any(drawn, beta1, level)
        spent[which] = tokens[rows].sum(axis=-1, dtype=np.int64)
    binary &= not (floats["least"] < 0).any()  # of samples that count alone: a later round changes no earlier one
    k = np.rint(floats["mean"] * counts).astype(np.int64)
    low[binary], high[binary] = _exact_interval(k[binary], counts[binary], beta1, level)
    equal = ~binary & (floats["least"] == floats["most"])
    low[equal], high[equal] = _interval_of_equals(floats["most"][equal], counts[equal], beta1, level)
    return Estimates(uids=list(uids), **floats, low=low, high=high, samples=np.array(counts, np.int64), tokens=spent)


def counted(rewards: np.ndarray, prompt: np.ndarray, num_prompts: int) -> np.ndarray:
    """Return rewards, of any shape, with what counts for NaN: the lowest of its prompt's, at most 0.

    `prompt`, of the same shape, says by a number below `num_prompts` whose each reward is.
    """
    unscored = np.isnan(rewards)
    if not unscored.any():
        return rewards
    lowest = np.zeros(num_prompts)
    np.minimum.at(lowest, prompt[~unscored], rewards[~unscored])
    return np.where(unscored, lowest[prompt], rewards)


def _of_equal_count(counts: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Each number of samples, and the prompts that have as many, no more at once than memory has room for."""
    for count in np.unique(counts):
        which = np.flatnonzero(counts == count)
        step = max(1, _ROWS_AT_ONCE // int(count))
        for start in range(0, len(which), step):
            yield int(count), which[start : start + step]


def _exact_interval(k: np.ndarray, n: np.ndarray, beta1: float, level: float) -> tuple[np.ndarray, np.ndarray]:
    """[P] each; k passes of n. Each pair (k, n) is computed once."""
    pairs, inverse = np.unique(np.stack([k, n]), axis=1, return_inverse=True)
    if not pairs.size:
        return np.empty(0), np.empty(0)
    step = max(1, _ROWS_AT_ONCE // int(n.max()))
    parts = [torch.from_numpy(pairs[:, start : start + step]) for start in range(0, pairs.shape[1], step)]
    ends = zip(*(value.pass_rate_interval(passes, counts, level) for passes, counts in parts), strict=True)
    low, high = (value.v_star_from_pass_rate(torch.cat(end), 1.0, beta1).numpy()[inverse.reshape(-1)] for end in ends)
    return low, high


def _interval_of_equals(c: np.ndarray, n: np.ndarray, beta1: float, level: float) -> tuple[np.ndarray, np.ndarray]:
    """[P] each; n samples of reward c."""
    rate = 1 - ((1 - level) / 2) ** (1 / n)  # the upper end of Clopper and Pearson for 0 of n
    other = np.stack([np.minimum(c, -1.0), np.maximum(c, 1.0)])  # [2, P]
    rewards = torch.from_numpy(np.stack([np.stack([c, c]), other], axis=-1))  # [2, P, 2]
    shares = torch.from_numpy(np.stack([1 - rate, rate], axis=-1))  # [P, 2]
    low, high = value.v_star(rewards, beta1, shares).numpy()
    return low, high


def _interval_of_any(drawn: torch.Tensor, beta1: float, level: float) -> tuple[np.ndarray, np.ndarray]:
    """[P] each, of rewards [P, N]."""
    num_samples = drawn.shape[-1]
    share = min(1.0, math.sqrt(math.log(2 / (1 - level)) / 2 / num_samples))
    left = (torch.arange(1, num_samples + 1, dtype=torch.float64) / num_samples - share).clamp(0, 1 / num_samples)
    left[left < 1e-12] = 0  # rounding, which a small beta1 would blow up
    weight = torch.cat([left, left.new_tensor([share])]).expand(len(drawn), -1)
    rising = drawn.to(torch.float64).sort(dim=-1).values
    least, most = rising[:, :1].clamp(max=-1), rising[:, -1:].clamp(min=1)
    ends = (torch.cat([rising.flip(-1), least], dim=-1), torch.cat([rising, most], dim=-1))
    low, high = (value.v_star(rewards, beta1, weight).numpy() for rewards in ends)
    return low, high
