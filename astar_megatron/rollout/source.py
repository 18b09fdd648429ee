"""Requests in, scored rollouts out: one way for stage 1, training and evaluation.

A thread of its own keeps the engines busy: it hands out what was asked for whenever a queue runs low (feed.py), and
gives what comes back to the reward's processes (scoring.py), so generation and scoring go on while the driver trains.
What an engine had when it ended is asked again with its seeds, of any engine.
"""

import itertools
import math
import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, Self

from astar_megatron.cluster.errors import ClusterError
from astar_megatron.config import RewardConfig, SamplingConfig
from astar_megatron.rollout.engine import Response
from astar_megatron.rollout.feed import Feed, Item
from astar_megatron.rollout.scoring import Indexed, Pending, Scorer
from astar_megatron.types import Request, Rollout

_POLL_SECONDS = 0.1  # after which the answers to newly handed out requests are looked for too
_CLOSE_SECONDS = 30.0
_MOST_ENDS = 3  # of engines that had one request: more would hardly be by chance
_MOST_NAMED = 5  # prompts in an error


class _Handed:
    """What one call gave to an engine."""

    def __init__(self, engine: int, items: Sequence[Item]) -> None:
        self.engine = engine
        self.unanswered = {tag: request.prompt.uid for tag, request in items}


class Engines(Protocol):
    """What a source needs of a pool of engines; see pool.EnginePool."""

    max_num_seqs: int
    detokenize: Callable[[Sequence[int]], str]

    def __len__(self) -> int: ...

    def serving(self) -> Sequence[int]: ...

    def generate(self, engine: int, requests: Sequence[Item], sampling: SamplingConfig) -> Any: ...

    def responses(self, streams: Sequence[Any], seconds: float) -> list[tuple[Any, list[Response] | None]]: ...

    def forget(self, streams: Sequence[Any]) -> None: ...


class Draw:
    """Requests on their way, numbered as they were asked for. `changed` guards what the source's thread changes too."""

    def __init__(self, changed: threading.Condition) -> None:
        self.num_asked = self.num_unanswered = 0  # of those asked for, what the engines have not answered
        self._num_scored = 0
        self._early: dict[int, Rollout] = {}  # by number: what `finished` has looked at
        self._news: queue.SimpleQueue[Pending | Exception | None] = queue.SimpleQueue()
        self._changed = changed

    def wait_for_engines(self) -> None:
        """Wait until the engines have answered everything, or can't; it may still have to be scored."""
        with self._changed:
            self._changed.wait_for(lambda: not self.num_unanswered)

    def scored(self) -> Iterator[Indexed]:
        """Yield (number, rollout) pairs as they are scored, until nothing that was asked for is missing.

        Whenever the engines have answered something it yields too, with no pairs if none is scored.
        """
        while self._num_scored < self.num_asked:
            pairs = self._next() + self._there()  # all of it, or a slow driver would fall behind
            self._num_scored += len(pairs)
            yield pairs

    def _there(self) -> Indexed:
        """Return what is scored and nobody has taken; an error waits for the next to wait."""
        pairs: Indexed = []
        try:
            while not self._news.empty():
                pairs += self._next()
        except Exception as error:
            self._news.put(error)
        return pairs

    def _next(self) -> Indexed:
        news = self._news.get()
        if isinstance(news, Exception):
            raise news
        return news.result() if news else []

    def rollouts(self) -> list[Rollout]:
        """Return the scored rollouts in the order of their requests."""
        by_number = self._early
        for pairs in self.scored():
            by_number.update(pairs)
        return [by_number[number] for number in range(self.num_asked)]

    def finished(self) -> list[Rollout]:
        """Return those that are scored by now, in the order of their requests; `rollouts` still returns all."""
        pairs = self._there()
        self._num_scored += len(pairs)
        self._early.update(pairs)
        return [rollout for _, rollout in sorted(self._early.items())]

    def hear(self, news: Pending | Exception | None) -> None:
        """Take what is scored, or the error that ends it all; None: engines have answered. Called by any thread."""
        self._news.put(news)


class RolloutSource:
    """Draws and scores responses with engines that hold what they are to be drawn from. A context manager.

    Failures to score go to `run_dir`; see Scorer. Its methods are for one thread, the driver's; an error of engines or
    reward is raised where the driver waits for rollouts.
    """

    def __init__(self, engines: Engines, sampling: SamplingConfig, reward: RewardConfig, run_dir: Path) -> None:
        self._engines, self._sampling = engines, sampling
        self._scorer = Scorer(reward, run_dir)
        self._feed = Feed(len(engines), engines.max_num_seqs)
        self._tags = itertools.count()
        self._draws: dict[int, tuple[Draw, int]] = {}  # by tag: the draw, and the request's number in it
        self._streams: dict[Any, _Handed] = {}  # of answers
        self._changed = threading.Condition()  # guards the feed, the draws and the streams
        self._error: Exception | None = None
        self._closing = self._holds_back = False
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(_CLOSE_SECONDS)
        self._engines.forget(list(self._streams))
        self._scorer.close()

    def ask(self, requests: Iterable[Request], draw: Draw | None = None) -> Draw:
        """Ask for rollouts and return at once: a new draw, or `draw` with more in it."""
        draw = draw or Draw(self._changed)
        with self._changed:
            if self._error is not None:
                raise self._error
            for request in requests:
                tag = next(self._tags)
                self._draws[tag] = (draw, draw.num_asked)
                self._feed.ask([(tag, request)])
                draw.num_asked += 1
                draw.num_unanswered += 1
            self._hand_out()
            self._changed.notify_all()
        return draw

    def stream(self, requests: Iterable[Request]) -> Iterator[list[Rollout]]:
        """Yield rollouts as they are scored. `requests` are taken as engines have room: there may be no end of them."""
        waiting, draw = iter(requests), Draw(self._changed)
        self._fill(waiting, draw)
        for pairs in draw.scored():
            self._fill(waiting, draw)  # also while a slow reward keeps everything: the engines must not wait for it
            if pairs:
                yield [rollout for _, rollout in pairs]
                self._fill(waiting, draw)

    def _fill(self, waiting: Iterator[Request], draw: Draw) -> None:
        while fresh := list(islice(waiting, self._room())):
            self.ask(fresh, draw)

    def _room(self) -> int:
        with self._changed:
            return self._feed.room()

    @contextmanager
    def drained(self) -> Iterator[None]:
        """Wait until no engine has a request, and hand none out in the body. Raises what ended the engines."""
        with self._changed:
            self._holds_back = True
            self._changed.wait_for(lambda: self._error is not None or not self._streams)
            if self._error is not None:
                raise self._error
        try:
            yield
        finally:
            with self._changed:
                self._holds_back = False
                self._hand_out()
                self._changed.notify_all()

    def take_idle_seconds(self) -> float:
        """Return how long an engine had nothing to do since the last call, the mean over the engines."""
        with self._changed:
            return self._feed.take_idle_seconds()

    def take_busy(self) -> list[tuple[float, float]]:
        """Return from when to when any engine had something to do since the last call, by time.perf_counter()."""
        with self._changed:
            return self._feed.take_busy()

    def _hand_out(self) -> None:
        """Give each engine what it has room for; the lock is held."""
        if self._holds_back or not self._feed.num_waiting:
            return
        for engine, items in self._feed.due(self._engines.serving()):
            self._streams[self._engines.generate(engine, items, self._sampling)] = _Handed(engine, items)

    def _serve(self) -> None:
        """Thread: hand out, take back, give to the reward's processes."""
        try:
            while streams := self._streams_of_work():
                taken: list[tuple[int, Rollout]] = []  # tag and rollout
                try:
                    for stream, responses in self._engines.responses(list(streams), _POLL_SECONDS):
                        if responses is not None:
                            taken += self._take(streams[stream], responses)
                        else:
                            self._end(stream)
                finally:
                    self._score(taken)  # together: a thousand engines answer with a few responses each
        except Exception as error:  # of an engine, as a rule: it is the driver's to raise
            with self._changed:
                self._error = error
                for draw, _ in self._draws.values():
                    draw.num_unanswered = 0
                    draw.hear(error)
                self._changed.notify_all()

    def _streams_of_work(self) -> dict[Any, _Handed]:
        """Wait until engines have something to answer, and return from where; nothing: the source is closed."""
        with self._changed:
            self._hand_out()  # an engine may be back
            while not (self._closing or self._streams):
                self._changed.wait(_POLL_SECONDS if self._feed.num_waiting else None)
                self._hand_out()
            return {} if self._closing else dict(self._streams)

    def _end(self, stream: Any) -> None:
        """Take back what an engine did not answer before it ended. Raises where that has happened too often."""
        with self._changed:
            handed = self._streams.pop(stream)
            num_ends = self._feed.give_back(handed.engine, handed.unanswered)
            self._changed.notify_all()
        if num_ends >= _MOST_ENDS:
            uids = sorted(set(handed.unanswered.values()))
            raise ClusterError(
                f"engine {handed.engine} ended, as {num_ends - 1} before it did with the same request; it is of one of "
                f"these {len(uids)} prompts: {', '.join(uids[:_MOST_NAMED])}{', ...' * (len(uids) > _MOST_NAMED)}; "
                "look for what ends an engine in the lines above, or leave the prompt out"
            )

    def _take(self, handed: _Handed, responses: Sequence[Response]) -> list[tuple[int, Rollout]]:
        """Return what an engine has answered, by tag, and give it what it has room for now."""
        with self._changed:
            for response in responses:
                del handed.unanswered[response.tag]
            requests = [self._feed.answered(handed.engine, response.tag) for response in responses]
            self._hand_out()
        for request, response in zip(requests, responses, strict=True):
            _check_logprobs(handed.engine, request, response)
        pairs = zip(requests, responses, strict=True)
        return [(response.tag, self._rollout(request, response)) for request, response in pairs]

    def _score(self, taken: Sequence[tuple[int, Rollout]]) -> None:
        """Give rollouts, by tag, to the reward's processes, those of a draw together."""
        by_draw: defaultdict[Draw, Indexed] = defaultdict(list)
        with self._changed:
            places = [self._draws[tag] for tag, _ in taken]
        for (draw, number), (_, rollout) in zip(places, taken, strict=True):
            by_draw[draw].append((number, rollout))
        for draw, pairs in by_draw.items():
            self._scorer.submit(pairs).when_done(draw.hear)
            with self._changed:
                draw.num_unanswered -= len(pairs)
                self._changed.notify_all()
            draw.hear(None)
        with self._changed:
            for tag, _ in taken:  # only now: whoever still waits for one hears of an error
                del self._draws[tag]

    def _rollout(self, request: Request, response: Response) -> Rollout:
        return Rollout(
            prompt=request.prompt,
            sample=request.sample,
            seed=request.seed,
            token_ids=response.token_ids,
            text=self._engines.detokenize(response.token_ids),
            truncated=response.truncated,
            token_logprobs=response.token_logprobs,
            first_version=response.first_version,
            last_version=response.last_version,
            tokens_by_version=response.tokens_by_version,
        )


def _check_logprobs(engine: int, request: Request, response: Response) -> None:
    """Raise ClusterError where a log-prob is not finite: what the engine computed is broken, and its tokens random."""
    if math.isfinite(sum(response.token_logprobs)):  # then each is: much faster than to ask each
        return
    broken = [place for place, logprob in enumerate(response.token_logprobs) if not math.isfinite(logprob)]
    if broken:  # none where a sum of finite numbers is too large
        raise ClusterError(
            f"engine {engine} drew {len(broken)} of {len(response.token_ids)} tokens with a log-prob that is no finite "
            f"number, the first is token {broken[0]}: {response.token_logprobs[broken[0]]} (prompt "
            f"{request.prompt.uid}, sample {request.sample}, weights of version {response.first_version} to "
            f"{response.last_version}). The model's numbers overflow, or its GPU is faulty: try model.dtype=float32, "
            "or another node"
        )
