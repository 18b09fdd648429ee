"""A policy that gives its memory back between steps trains to the same bits."""

from functools import partial
from pathlib import Path
from typing import Any

import parked
import pytest
import torch
import training as work
from test_layouts import batch
from training import Run

from astar_megatron.config import ParallelConfig
from astar_megatron.model.compute_type import ComputeType
from astar_megatron.model.parking import forget_fp8_copies

CASES = [
    ({}, "float32", "all"),
    ({}, "bfloat16", "optimizer"),
    ({}, "bfloat16", "cache"),
    ({"data": 2}, "bfloat16", "all"),
    ({"tensor": 2, "pipeline": 2}, "bfloat16", "all"),
    ({"pipeline": 2, "virtual": 3}, "float32", "all"),
]


def test_copies_in_fp8_that_layers_keep_are_dropped() -> None:
    class Quantised(torch.nn.Linear):  # as Transformer Engine's layers, which keep a copy by a name
        def __init__(self) -> None:
            super().__init__(2, 3)
            self._fp8_workspaces = {"weight": self.weight.detach().clone()}

    layers = [Quantised(), Quantised()]
    forget_fp8_copies([torch.nn.Sequential(layers[0], torch.nn.ReLU()), layers[1]])
    assert [layer._fp8_workspaces for layer in layers] == [{}, {}]


@pytest.mark.parametrize(("axes", "dtype", "offload"), CASES, ids=str)
def test_what_was_given_back_is_there_again_bit_for_bit(
    axes: dict[str, int], dtype: ComputeType, offload: Any, ranks: Any, untied_qwen2: Path
) -> None:
    batches = [batch(1), batch(3, version=1), batch(2, version=2)]
    run = Run(str(untied_qwen2), batches, axes=axes, dtype=dtype)
    world = ParallelConfig(**axes).world_size  # type: ignore[arg-type]
    whole = ranks.run(work.trained, world, run=run)
    tamper = partial(parked.give_back_before_each_step, offload=offload)
    rested = ranks.run(work.trained, world, run=run, tamper=tamper)
    for rank, rank_that_rested in zip(whole, rested, strict=True):
        assert rank.digests == rank_that_rested.digests
        assert len(set(rank.digests)) == 4
