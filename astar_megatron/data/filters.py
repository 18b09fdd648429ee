"""Which prompts training takes, and how often: data from the V* table, nothing that the loop asks.

A prompt's weight is the share of the epochs that take it: 1 all, 0 none (dropped), 0.1 every tenth on average (taken
less, and tested again each time). The gradient's expectation is weighted so, and the loss knows nothing of it.

A response is right whose reward is 1. Some rewards give a wrong one a part for its form (0.1): wrong all the same.
"""

import numpy as np

from astar_megatron.config import FilterConfig
from astar_megatron.data.estimates import Estimates


def weights(estimates: Estimates, cfg: FilterConfig) -> dict[str, float]:
    """Return the weight by uid of the prompts that do not have weight 1. Of several that apply the smallest counts.

    Raises ValueError where no prompt is left.
    """
    weight = np.ones(len(estimates.uids))
    for applies, share in (
        (estimates.most < 1, cfg.all_wrong),
        (estimates.least >= 1, cfg.all_right),
        (estimates.width > cfg.max_width, cfg.wide),
    ):
        weight[applies] = np.minimum(weight[applies], share)
    if not weight.any():
        raise ValueError(
            f"filter: none of the {len(weight)} prompts is left; raise filter.all_wrong, filter.all_right or "
            "filter.wide above 0, or draw more samples (sweep.num_samples)"
        )
    return {estimates.uids[i]: float(weight[i]) for i in np.flatnonzero(weight < 1)}
