"""Gradients that a layer of Transformer Engine adds to the float32 sum itself are there once, beside all others.

Transformer Engine needs a GPU; the layer here does what its source does, under megatron's DistributedDataParallel.
"""

from typing import Any

import pytest
import summed_in_place as work
import torch


@pytest.mark.parametrize("in_place", [True, False])
def test_every_gradient_is_summed_once_over_micro_batches_and_mini_batches(in_place: bool, ranks: Any) -> None:
    (mini_batches,) = ranks.run(work.gradients, 1, in_place=in_place)
    for mini_batch in mini_batches:
        assert set(mini_batch) == {"embedding.weight", "linear.weight"}
        for name, both in mini_batch.items():
            gradient, wanted = map(torch.tensor, both)
            assert gradient.isfinite().all(), name
            rounding = 2**-8 if in_place and name == "linear.weight" else 0.0  # autograd's is rounded to bfloat16
            assert (gradient - wanted).abs().max() <= rounding * wanted.abs().max(), name
            assert wanted.abs().max() > 0
        gradient, wanted = mini_batch["linear.weight"]
        assert (gradient != wanted) == in_place  # it is not rounded before it is summed
