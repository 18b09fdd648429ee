"""Who has the memory that policy and engines share, and that a side which keeps more and more of it is named."""

from typing import Any

import pytest

from astar_megatron.cluster.errors import ActorLost, ClusterError
from astar_megatron.run.resources import GIB
from astar_megatron.run.sharing import Turns


class Sides:
    """Two ranks and three engines, in one: what they do is in `done`."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.kept, self.returned = [3 * GIB, 4 * GIB], {0: 7 * GIB, 1: 8 * GIB, 2: 9 * GIB}

    def __len__(self) -> int:
        return 3

    def release(self, offload: Any) -> list[tuple[int, int]]:
        self.done.append(f"release {offload}")
        return [(5 * GIB, kept) for kept in self.kept]

    def resume(self) -> None:
        self.done.append("resume")

    def restart(self) -> None:
        self.done.append("restart")

    def sleep(self) -> dict[int, int]:
        self.done.append("sleep")
        return self.returned

    def wake(self, part: str) -> None:
        self.done.append(f"wake {part}")


@pytest.fixture
def sides() -> Sides:
    return Sides()


def turns(sides: Sides, lines: list[str] | None = None) -> Turns:
    return Turns(sides, sides, "optimizer", (lines if lines is not None else []).append, sides.sleep())


def a_step(own: Turns) -> None:
    own.begin_publishing()
    own.begin_generating()
    own.begin_training()


def test_no_two_sides_have_the_memory_at_once(sides: Sides) -> None:
    lines: list[str] = []
    own = turns(sides, lines)
    for _ in range(2):
        sides.done.clear()
        a_step(own)
        assert sides.done == ["release optimizer", "wake weights", "wake kv_cache", "sleep", "resume"]
    assert len(lines) == 2 and "7.0 GiB" in lines[0] and "5.0 GiB" in lines[1]


def test_a_turn_that_is_there_already_is_not_taken_again(sides: Sides) -> None:
    own = turns(sides)
    a_step(own)
    own.begin_training()
    assert sides.done[-1] == "resume" and sides.done.count("resume") == 1
    own.begin_publishing()
    own.begin_generating()
    sides.done.clear()
    own.begin_publishing()  # after an evaluation, where the policy has not moved
    own.begin_generating()
    assert sides.done == []


@pytest.mark.parametrize(
    ("side", "index", "words"), [("kept", 1, "policy rank 1 kept"), ("returned", 2, "engine 2 gave")]
)
def test_a_residue_that_grows_ends_the_run_and_names_who_holds_it(
    side: str, index: int, words: str, sides: Sides
) -> None:
    own, sign = turns(sides), 1 if side == "kept" else -1
    a_step(own)
    if side == "kept":
        sides.kept[index] += 5 * GIB  # what the first step takes once
        a_step(own)
    getattr(sides, side)[index] += sign * GIB
    a_step(own)  # what may be
    getattr(sides, side)[index] += sign
    sides.done.clear()
    with pytest.raises(ClusterError, match=f"memory of shared GPUs: {words}"):
        a_step(own)


@pytest.mark.parametrize(("num_begun", "before"), [(0, []), (1, ["wake kv_cache", "sleep"]), (2, ["sleep"]), (3, [])])
def test_ranks_that_take_the_place_of_dead_ones_start_while_engines_sleep(
    num_begun: int, before: list[str], sides: Sides
) -> None:
    own = turns(sides)
    for begin in (own.begin_publishing, own.begin_generating, own.begin_training)[:num_begun]:
        begin()
    sides.done.clear()
    own.restart_policy()
    assert sides.done == [*before, "restart"]
    sides.done.clear()
    own.begin_training()  # which all begins with
    assert sides.done == []
    a_step(own)
    assert sides.done[:2] == ["release optimizer", "wake weights"]


def test_what_the_first_step_of_new_ranks_takes_is_no_growth(sides: Sides) -> None:
    own = turns(sides)
    a_step(own)  # the first publish; in the step after it a rank ends
    own.restart_policy()
    a_step(own)
    sides.kept = [kept + 2 * GIB for kept in sides.kept]  # what a first step takes for good
    a_step(own)
    sides.kept = [kept + 2 * GIB for kept in sides.kept]
    with pytest.raises(ClusterError, match="policy rank 0 kept"):
        a_step(own)


@pytest.mark.parametrize("dies_in", ["release optimizer", "resume"])
def test_engines_that_sleep_when_a_rank_ends_in_its_turn_are_not_asked_to_again(dies_in: str) -> None:
    class Dying(Sides):
        def release(self, offload: Any) -> list[tuple[int, int]]:
            return self.or_end(super().release(offload))

        def resume(self) -> None:
            self.or_end(super().resume())

        def or_end[T](self, answer: T) -> T:
            if self.done[-1] == dies_in:
                raise ActorLost("rank 0 has ended", kind="policy rank", index=0)
            return answer

    sides = Dying()
    own = turns(sides)
    with pytest.raises(ActorLost):
        a_step(own)
    sides.done.clear()
    own.restart_policy()
    assert sides.done == ["restart"]


def test_an_engine_that_is_being_replaced_gives_nothing_back(sides: Sides) -> None:
    own = turns(sides)
    own.begin_publishing()
    own.begin_generating()
    del sides.returned[1]
    assert own.measured() == {"kept_bytes": [3 * GIB, 4 * GIB], "returned_bytes": [7 * GIB, 8 * GIB, 9 * GIB]}
    own.begin_training()
    assert sides.done[-2:] == ["sleep", "resume"]
    assert own.measured()["returned_bytes"] == [7 * GIB, None, 9 * GIB]


def test_an_engine_that_was_replaced_before_it_ever_slept_is_measured_from_then_on(sides: Sides) -> None:
    del sides.returned[1]
    own = turns(sides)
    assert own.measured() == {"kept_bytes": [], "returned_bytes": [7 * GIB, None, 9 * GIB]}
    sides.returned[1] = 8 * GIB
    a_step(own)
    a_step(own)
    sides.returned[1] = 6 * GIB
    with pytest.raises(ClusterError, match=r"engine 1 gave back 8\.0 GiB"):
        a_step(own)
