"""What engines stream comes to the pool, of all that have something at once; real Ray, and plain actors as engines."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from astar_megatron.cluster.cluster import Cluster
from astar_megatron.config import ClusterConfig
from astar_megatron.rollout.member import Member
from astar_megatron.rollout.pool import EnginePool


class Streaming:
    """Yields its own numbers; after `end` of them its process ends."""

    async def start(self) -> None: ...

    async def count(self, first: int, number: int, end: int) -> AsyncIterator[list[int]]:
        for value in range(first, first + number):
            if value - first == end:
                os._exit(3)
            yield [value]
            await asyncio.sleep(0.01)

    async def think(self) -> AsyncIterator[list[int]]:
        await asyncio.sleep(600.0)
        yield [0]


class Pool(EnginePool):
    """Of actors that are there already; one that has ended is lost."""

    def __init__(self, cluster: Cluster, actors: list[Any]) -> None:
        self._cluster, self._members = cluster, [Member(i, a, "", 1) for i, a in enumerate(actors)]
        self._error = self._not_brought = None
        self._streams: dict[Any, Member] = {}
        self._heard: dict[Any, float] = {}

    def replace(self, member: Member, cause: str) -> None:
        member.is_lost = True

    def count(self, engine: int, first: int, number: int, end: int = -1) -> Any:
        return self._asked(engine, lambda actor: actor.count(first, number, end))

    def think(self, engine: int) -> Any:
        return self._asked(engine, lambda actor: actor.think())

    def _asked(self, engine: int, call: Callable[[Any], Any]) -> Any:
        stream = self._begin(self._members[engine], call, num_returns="streaming")
        self._streams[stream], self._heard[stream] = self._members[engine], time.monotonic()
        return stream


def test_every_answer_comes_once_and_a_stream_ends_with_its_last_or_with_its_engine() -> None:
    env = {"PYTHONPATH": os.pathsep.join(str(Path(__file__).parents[level]) for level in (0, 2))}
    with Cluster(ClusterConfig()) as cluster:
        actors = [cluster.actor("engine", i, Streaming, env=env, concurrency=10) for i in range(2)]
        pool = Pool(cluster, actors)
        cluster.wait("start", [member.starting for member in pool._members], 120)
        streams = [pool.count(0, 0, 20), pool.count(0, 100, 5), pool.count(1, 200, 20, end=3)]
        answers: dict[Any, list[int]] = {stream: [] for stream in streams}
        left = list(streams)
        while left:
            for stream, values in pool.responses(left, 5.0):
                if values is None:
                    left.remove(stream)
                else:
                    answers[stream] += values  # type: ignore[arg-type]
        whole, short, cut = answers.values()
        assert whole == list(range(20)) and short == list(range(100, 105)) and cut == list(range(200, 200 + len(cut)))
        assert len(cut) <= 3 and not pool._streams
        assert [(member.is_lost, member.num_ends) for member in pool._members] == [(False, 0), (True, 0 if cut else 1)]
        assert pool.responses([pool.count(0, 0, 1)], 5.0)[0][1] == [0]
        silent = pool.think(0)
        for others in ([], [pool.count(0, 0, 1)]):  # an engine that says nothing to some is lost, whatever it says else
            pool._heard[silent] = time.monotonic()
            assert pool.responses([silent], 0.1) == [] and not pool._members[0].is_lost
            pool._heard[silent] -= 3601.0
            assert [stream for stream, _ in pool.responses([silent, *others], 5.0 if others else 0.1)] == others
            assert pool._members[0].is_lost
            pool._members[0].is_lost = False
