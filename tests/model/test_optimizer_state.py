"""A range of a tensor's elements in boxes: nothing twice, nothing left out, and in its order."""

from math import prod

import pytest
import torch

pytest.importorskip("hypothesis")
pytest.importorskip("pydantic")
pytest.importorskip("megatron")

from hypothesis import given
from hypothesis import strategies as st

from astar_megatron.model import checkpoint
from astar_megatron.model.optimizer_state import Box, boxes


@given(st.lists(st.integers(1, 7), min_size=1, max_size=4), st.data())
def test_boxes_are_the_elements_in_their_order(shape: list[int], data: st.DataObject) -> None:
    count = prod(shape)
    start, stop = sorted(data.draw(st.tuples(st.integers(0, count), st.integers(0, count))))
    elements = torch.arange(count).view(shape)
    cut = list(boxes(shape, start, stop))
    taken = [elements[tuple(slice(at, at + size) for at, size in zip(*box, strict=True))].flatten() for box in cut]
    assert torch.cat([torch.empty(0), *taken]).tolist() == list(range(start, stop))
    assert len(cut) <= max(1, 2 * len(shape) - 1) and all(prod(box.shape) for box in cut)


@pytest.mark.parametrize(
    ("shape", "start", "stop", "cut"),
    [
        ((4, 6), 0, 24, [Box((0, 0), (4, 6))]),
        ((4, 6), 9, 20, [Box((1, 3), (1, 3)), Box((2, 0), (1, 6)), Box((3, 0), (1, 2))]),
        ((4, 6), 9, 15, [Box((1, 3), (1, 3)), Box((2, 0), (1, 3))]),
        ((4, 6), 14, 17, [Box((2, 2), (1, 3))]),
        ((5,), 2, 4, [Box((2,), (2,))]),
    ],
)
def test_a_piece_is_part_of_a_row_whole_rows_and_part_of_a_row(
    shape: tuple[int, ...], start: int, stop: int, cut: list[Box]
) -> None:
    assert list(boxes(shape, start, stop)) == cut


def test_the_steps_of_a_loaded_optimizer_are_a_whole_number() -> None:
    """torch's Adam saves a float; Transformer Engine's hands the number to a kernel that takes an int."""
    steps = checkpoint._saved_step({"optimizer": {"param_groups": [{}, {"step": 3.0}]}})
    assert steps == 3 and isinstance(steps, int)
