"""A pool of engines made by hand: it answers a few requests at a time, as a rule out of order, as a function says."""

import random
import time
from collections.abc import Callable, Sequence
from typing import Any

from astar_megatron.config import SamplingConfig
from astar_megatron.rollout.engine import Response
from astar_megatron.types import Request

type Answer = tuple[tuple[int, ...], bool]  # the response's tokens, and whether the limit cut it


def text_of(token_ids: Sequence[int]) -> str:
    return bytes(token_ids).decode()


class FakeEngines:
    """See source.Engines. `asked` and `answered` are (engine or stream, request) in the order in which it happened.

    `end` and `join` are the death of an engine and its return.
    """

    def __init__(
        self,
        answer: Callable[[Request], Answer],
        detokenize: Callable[[Sequence[int]], str] = text_of,
        *,
        num_engines: int = 1,
        max_num_seqs: int = 20,
        at_once: int = 13,
        streams_at_once: int = 1,
        seconds: float = 0.0,
        in_order: bool = False,
        logprob: float = -0.5,
    ) -> None:
        self.max_num_seqs, self.detokenize = max_num_seqs, detokenize
        self.version = 0
        self.asked: list[tuple[int, Request]] = []
        self.answered: list[tuple[int, Request]] = []
        self._answer, self._num_engines, self._at_once, self._seconds = answer, num_engines, at_once, seconds
        self._in_order, self._streams_at_once, self._logprob = in_order, streams_at_once, logprob
        self._shuffle, self._num_streams = random.Random(at_once), 0
        self._streams: dict[int, list[tuple[int, int, Request]]] = {}  # version, tag, request
        self._engine_of: dict[int, int] = {}
        self._serving, self._ended = set(range(num_engines)), set[int]()  # engines, streams

    def __len__(self) -> int:
        return self._num_engines

    def serving(self) -> list[int]:
        return sorted(self._serving)

    def end(self, engine: int) -> None:
        self._serving.discard(engine)
        self._ended |= {stream for stream, its in self._engine_of.items() if its == engine}

    def join(self, engine: int) -> None:
        self._serving.add(engine)

    def generate(self, engine: int, requests: Sequence[tuple[int, Request]], sampling: SamplingConfig) -> int:
        self.asked += [(engine, request) for _, request in requests]
        self._num_streams += 1
        self._engine_of[self._num_streams] = engine
        self._streams[self._num_streams] = [(self.version, tag, request) for tag, request in requests]
        return self._num_streams

    def responses(self, streams: Sequence[Any], seconds: float) -> list[tuple[Any, list[Response] | None]]:
        if self._in_order or self._streams_at_once == 1:
            return [self._news(min(streams) if self._in_order else self._shuffle.choice(streams))]
        return [self._news(s) for s in self._shuffle.sample(streams, min(len(streams), self._streams_at_once))]

    def _news(self, stream: Any) -> tuple[Any, list[Response] | None]:
        left = self._streams[stream]
        if not left or stream in self._ended:
            return stream, None
        time.sleep(self._seconds)
        if not self._in_order:
            self._shuffle.shuffle(left)
        now, self._streams[stream] = left[: self._at_once], left[self._at_once :]
        self.answered += [(stream, request) for *_, request in now]
        return stream, [self._respond(*item) for item in now]

    def forget(self, streams: Sequence[int]) -> None:
        for stream in streams:
            self._streams.pop(stream, None)

    def _respond(self, version: int, tag: int, request: Request) -> Response:
        token_ids, truncated = self._answer(request)
        return Response(
            tag=tag,
            token_ids=token_ids,
            truncated=truncated,
            token_logprobs=(self._logprob,) * len(token_ids),
            first_version=version,
            last_version=self.version,
            tokens_by_version=(len(token_ids), *(0,) * (self.version - version)),
        )
