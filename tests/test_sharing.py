"""Who has the memory that policy and engines share, and that a side which keeps more and more of it is named."""

from typing import Any

import pytest

from astar_megatron.cluster.errors import ClusterError
from astar_megatron.run.resources import GIB
from astar_megatron.run.sharing import Turns


class Sides:
    """Two ranks and three engines, in one: what they do is in `done`."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.kept, self.returned = [3 * GIB, 4 * GIB], [7 * GIB, 8 * GIB, 9 * GIB]

    def release(self, offload: Any) -> list[tuple[int, int]]:
        self.done.append(f"release {offload}")
        return [(5 * GIB, kept) for kept in self.kept]

    def resume(self) -> None:
        self.done.append("resume")

    def sleep(self) -> list[int]:
        self.done.append("sleep")
        return self.returned

    def wake(self, part: str) -> None:
        self.done.append(f"wake {part}")


@pytest.fixture
def sides() -> Sides:
    return Sides()


def turns(sides: Sides, said: list[str] | None = None) -> Turns:
    return Turns(sides, sides, "optimizer", (said if said is not None else []).append)


def a_step(own: Turns) -> None:
    own.begin_publishing()
    own.begin_generating()
    own.begin_training()


def test_no_two_sides_have_the_memory_at_once(sides: Sides) -> None:
    said: list[str] = []
    own = turns(sides, said)
    a_step(own)
    assert sides.done == ["release optimizer", "sleep", "resume"]  # at first the engines are awake
    sides.done.clear()
    a_step(own)
    assert sides.done == ["release optimizer", "wake weights", "wake kv_cache", "sleep", "resume"]
    assert len(said) == 2 and "5.0 GiB" in said[0] and "7.0 GiB" in said[1]


def test_a_turn_that_is_there_already_is_not_taken_again(sides: Sides) -> None:
    own = turns(sides)
    a_step(own)
    for begin in (own.begin_training, own.begin_publishing, own.begin_generating):
        begin()
        sides.done.clear()
        begin()
        assert sides.done == (["wake weights"] if begin == own.begin_publishing else [])


@pytest.mark.parametrize(
    ("side", "index", "words"), [("kept", 1, "policy rank 1 kept"), ("returned", 2, "engine 2 gave")]
)
def test_a_residue_that_grows_ends_the_run_and_names_who_holds_it(
    side: str, index: int, words: str, sides: Sides
) -> None:
    own, sign = turns(sides), 1 if side == "kept" else -1
    a_step(own)
    getattr(sides, side)[index] += sign * GIB
    a_step(own)  # what may be
    getattr(sides, side)[index] += sign
    with pytest.raises(ClusterError, match=f"memory of shared GPUs: {words}"):
        a_step(own)
