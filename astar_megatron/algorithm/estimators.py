"""What n samples a problem say of a model: pass@k, maj@n, and the standard error of a mean over problems.

pass@k is the exact expectation over all draws of k of the n samples without replacement (Chen et al., arXiv
2107.03374), so it is unbiased for k independent samples; maj@n is the vote of all n.
"""

import math
from collections.abc import Sequence


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Return the probability that k of the samples, drawn without replacement, hold a right one. 1 <= k <= samples."""
    if not 1 <= k <= num_samples or not 0 <= num_right <= num_samples:
        raise ValueError(
            f"pass@k: expected 1 <= k <= samples and right <= samples, got {k}, {num_samples}, {num_right}"
        )
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def majority(groups: Sequence[tuple[int, float]]) -> float:
    """Return the reward of the commonest answer. `groups` has one (samples, mean reward) an answer.

    Answers that are equally common share; without any answer the reward is 0.
    """
    most = max((count for count, _ in groups), default=0)
    commonest = [reward for count, reward in groups if count == most]
    return math.fsum(commonest) / len(commonest) if commonest else 0.0


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error; the error of a single value is NaN."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)
