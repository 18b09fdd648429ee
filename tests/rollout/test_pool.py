"""Engines that are replaced, with a cluster made by hand; tests/e2e/test_deaths.py kills real ones."""

import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from astar_megatron.cluster.errors import ActorLost, ClusterError
from astar_megatron.cluster.placement import Node, Seat
from astar_megatron.config import RolloutConfig, SamplingConfig
from astar_megatron.rollout.engine import EngineOptions
from astar_megatron.rollout.member import Member
from astar_megatron.rollout.pool import EnginePool

SEATS = [Seat(node=Node(address="127.0.0.1", num_gpus=0, id="n"))] * 2


class Actor:
    """An engine that answers, until it `is_dead`; of its methods those in `failing` raise."""

    def __init__(self, index: int, *, is_dead: bool) -> None:
        self.index, self.is_dead = index, is_dead
        self.failing: set[str] = set()

    def __getattr__(self, method: str) -> Any:
        return Method(self, method)


class Method:
    def __init__(self, actor: Actor, name: str) -> None:
        self.actor, self.name = actor, name

    def options(self, **_: object) -> "Method":
        return self

    def remote(self, *arguments: object) -> "Method":
        return self


class Cluster:
    """Its actors die, by index, as often as `deaths_at_start` says before one starts."""

    num_gpus, num_nodes, socket_folder, timeout_seconds = 0, 1, None, 60.0

    def __init__(self) -> None:
        self.reservation = SimpleNamespace(placement=SimpleNamespace(engines=SEATS))
        self.actors: list[Actor] = []
        self.ended: list[Actor] = []
        self.deaths_at_start: dict[int, int] = {}

    def threads(self, seats: Any, workers: int = 1) -> int:
        return 1

    def actor(self, kind: str, index: int, cls: type, **_: object) -> Actor:
        deaths = self.deaths_at_start.get(index, 0)
        self.deaths_at_start[index] = deaths - 1
        self.actors.append(Actor(index, is_dead=deaths > 0))
        return self.actors[-1]

    def wait(self, action: str, calls: list[Method], timeout_seconds: float | None = None) -> list[Any]:
        for call in calls:
            if call.actor.is_dead:
                message = f"{action}: the process ended\nengine {call.actor.index}: was killed by SIGKILL"
                raise ActorLost(message, kind="engine", index=call.actor.index)
            if call.name in call.actor.failing:
                raise ClusterError(f"{action}: failed\nengine {call.actor.index}: TransferError: late")
        return [[] for _ in calls]

    def end(self, actors: list[Actor]) -> None:
        for actor in actors:
            actor.is_dead = True
        self.ended += actors

    def logs_of(self, actor: Actor) -> str:
        return "/logs"

    def close(self, action: str, calls: list[Method]) -> None: ...

    def remember_shared_files(self) -> None: ...

    def remember_processes(self, actors: list[Actor]) -> None: ...


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


@pytest.fixture
def pool(cluster: Cluster) -> Iterator[EnginePool]:
    options = EngineOptions(
        model_path="m",
        dtype="float32",
        max_tokens=9,
        stop_token_ids=(),
        seed=0,
        rollout=RolloutConfig(num_engines=2, heartbeat_seconds=0.1),
        on_gpu=False,
    )
    made = EnginePool(cluster, options, detokenize=str)  # type: ignore[arg-type]
    made.start()
    yield made
    made.close()


def wait_for(condition: Callable[[], object]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_dead_engine_is_replaced_and_serves_when_it_has_its_weights(cluster: Cluster, pool: EnginePool) -> None:
    given: list[int] = []
    may_go_on = threading.Event()

    def bring(member: Member) -> None:
        given.append(member.index)
        may_go_on.wait(60)
        pool.serve([member])

    pool.bring = bring
    first, second = cluster.actors
    second.is_dead = True
    wait_for(lambda: given)
    assert pool.serving() == [0] and [member.index for member in pool.running()] == [0, 1]
    assert pool.generate(1, [], SamplingConfig()).actor is second  # asked by whoever does not know yet: it has ended
    may_go_on.set()
    wait_for(lambda: pool.serving() == [0, 1])
    assert pool.generate(1, [], SamplingConfig()).actor is cluster.actors[2]
    assert given == [1] and cluster.ended == [second] and len(cluster.actors) == 3
    assert [member.actor for member in pool.running()] == [first, cluster.actors[2]]
    wait_for(lambda: pool.num_replaced() == 1)
    assert pool.num_replaced() == 0


def test_an_engine_that_has_ended_takes_no_requests_from_the_one_in_its_place(
    cluster: Cluster, pool: EnginePool
) -> None:
    first, _ = pool.running()
    cluster.actors[0].is_dead = True
    wait_for(lambda: len(cluster.actors) == 3 and pool.serving() == [0, 1])
    pool.serve([first])  # whoever checked its weights hears late of its end
    assert pool.serving() == [0, 1] and pool.generate(0, [], SamplingConfig()).actor is cluster.actors[2]


def test_an_engine_that_does_not_answer_or_whose_core_is_dead_is_ended_and_replaced(
    cluster: Cluster, pool: EnginePool, caplog: pytest.LogCaptureFixture
) -> None:
    cluster.actors[0].failing = {"beat"}
    wait_for(lambda: len(cluster.actors) == 3 and pool.serving() == [0, 1])
    assert cluster.ended == [cluster.actors[0]]
    assert caplog.messages[0] == "engine 0: TransferError: late; it is being replaced"
    wait_for(lambda: "engine 0: replaced in 0 s" in caplog.messages)


def test_an_engine_that_does_not_start_again_is_tried_twice_more_and_then_ends_the_run(
    cluster: Cluster, pool: EnginePool
) -> None:
    cluster.deaths_at_start[0] = 2
    cluster.actors[0].is_dead = True

    def has_ended() -> bool:
        try:
            pool.serving()
        except ClusterError as error:
            return "engine 0 has ended 3 times, and answered nothing in between" in str(error)
        return False

    wait_for(has_ended)
    assert len(cluster.actors) == 2 + 2
    pool.go_on()  # another policy does not bring it back
    assert has_ended()


def test_an_update_is_of_those_that_took_it_and_only_the_dead_are_replaced(cluster: Cluster, pool: EnginePool) -> None:
    first, second = pool.running()
    cluster.actors[0].failing = {"update"}
    assert pool.update(3, [first, second], []) == [second]
    assert pool.serving() == [1] and pool.running() == [first, second]  # it may take the next one
    cluster.actors[1].is_dead = True
    assert pool.update(3, [first, second], []) == []
    wait_for(lambda: pool.serving() == [1])
    assert cluster.ended == [second.actor] and pool.running()[0] is first


def test_what_a_call_fails_of_is_raised_where_the_engine_is_well(cluster: Cluster, pool: EnginePool) -> None:
    cluster.actors[1].failing = {"audit"}
    with pytest.raises(ClusterError, match="engine 1: TransferError"):
        pool.audit(0, pool.running())
    cluster.actors[1].is_dead = True
    answers = pool.audit(0, [member for member in pool.running() if not member.is_lost])
    assert [member.index for member in answers] in ([0], [0, 1])  # by whether it has been replaced by then


def test_weights_that_a_replaced_engine_does_not_hold_end_the_run_unless_the_policy_is_another_by_then(
    cluster: Cluster, pool: EnginePool
) -> None:
    def bring(member: Member) -> None:
        raise ValueError("worker 0 of engine 0 does not hold lm_head.weight")

    pool.bring = bring
    cluster.actors[0].is_dead = True
    wait_for(lambda: pool._not_brought)
    with pytest.raises(ValueError, match=r"does not hold lm_head\.weight"):
        pool.serving()
    pool.go_on()
    assert pool.serving() == [1] and [member.index for member in pool.running()] == [0, 1]


def test_no_engine_starts_while_others_need_the_memory(cluster: Cluster, pool: EnginePool) -> None:
    pool.hold_back()
    cluster.actors[0].is_dead = True
    wait_for(lambda: cluster.ended)
    time.sleep(0.2)
    assert len(cluster.actors) == 2 and pool.serving() == [1]
    may_go_on, starts = threading.Event(), threading.Event()

    def bring(member: Member) -> None:
        starts.set()
        may_go_on.wait(60)
        pool.serve([member])

    pool.bring = bring
    pool.let_start()
    starts.wait(60)
    threading.Timer(0.2, may_go_on.set).start()
    pool.hold_back()  # waits for the one that starts
    assert pool.serving() == [0, 1]
    pool.let_start()
