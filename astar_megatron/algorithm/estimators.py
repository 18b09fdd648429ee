"""What n samples a problem say of a model: pass@k, maj@k, and the standard error of a mean over problems.

pass@k and maj@k are the exact expectations over all draws of k of the n samples without replacement (pass@k: Chen et
al., arXiv 2107.03374), so they are unbiased for k independent samples.
"""

import math
from collections import defaultdict
from collections.abc import Sequence


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Return the probability that k of the samples, drawn without replacement, hold a right one. 1 <= k <= samples."""
    if not 1 <= k <= num_samples or not 0 <= num_right <= num_samples:
        raise ValueError(
            f"pass@k: expected 1 <= k <= samples and right <= samples, got {k}, {num_samples}, {num_right}"
        )
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def majority_at_k(groups: Sequence[tuple[int, float]], num_without: int, k: int) -> float:
    """Return the expected reward of the commonest answer among k of the samples, drawn without replacement.

    `groups` has one (count, reward) an answer, `num_without` counts samples that give none and have no vote. Answers
    that are equally common share; where no sample of the draw gives an answer the reward is 0.
    """
    total = num_without + sum(count for count, _ in groups)
    if not 1 <= k <= total or any(count < 1 for count, _ in groups):
        raise ValueError(f"maj@k: expected 1 <= k <= {total} samples and counts of at least 1, got k {k}, {groups}")
    expected = 0.0
    for index, (count, reward) in enumerate(groups):
        others = [other for i, (other, _) in enumerate(groups) if i != index]
        for votes in range(1, min(count, k) + 1) if reward else ():
            ways = math.comb(count, votes)
            for ties, rest in _ways_without_more(others, num_without, votes, k - votes).items():
                expected += reward * ways * rest / (1 + ties)
    return expected / math.comb(total, k)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error; the error of a single value is NaN."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)


def _ways_without_more(counts: Sequence[int], num_without: int, votes: int, draw: int) -> dict[int, int]:
    """In how many ways `draw` samples of the other groups hold at most `votes` of each, by the number with exactly so
    many."""
    ways = {(drawn, 0): math.comb(num_without, drawn) for drawn in range(min(num_without, draw) + 1)}
    for count in counts:
        following: defaultdict[tuple[int, int], int] = defaultdict(int)
        for (drawn, ties), number in ways.items():
            for taken in range(min(count, votes, draw - drawn) + 1):
                following[drawn + taken, ties + (taken == votes)] += number * math.comb(count, taken)
        ways = following
    found: defaultdict[int, int] = defaultdict(int)
    for (drawn, ties), number in ways.items():
        if drawn == draw:
            found[ties] += number
    return found
