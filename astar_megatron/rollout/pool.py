"""The pool: engines as Ray actors. Requests reach them, and rollouts come of them, in source.py.

An engine that ends, hangs or fails is replaced by a new actor of the same index, while the others go on. It serves
again when the owner of the weights has brought it to those of the others, with proof: `bring`.
"""

import contextlib
import itertools
import logging
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

import ray

from astar_megatron.cluster.calls import Call, answers_of
from astar_megatron.cluster.cluster import Cluster
from astar_megatron.cluster.errors import ActorLost, ClusterError
from astar_megatron.config import SamplingConfig
from astar_megatron.rollout.engine import Engine, EngineOptions, Response, check_graphs, environment, graphs_of
from astar_megatron.rollout.engine_actor import EngineActor, phase
from astar_megatron.rollout.member import Member, cause_of, taking_weights, watch
from astar_megatron.types import Request
from conversion.transfer.route import Place

_LOG = logging.getLogger(__name__)
_MOST_ENDS = 3  # of the engines of one index without an answer in between: another one would not help
_TOGETHER_SECONDS = 0.05  # in which other engines' answers may still come to the first
_LEAST_STALL_SECONDS = 10.0  # of a transfer of weights

type Stream = Any  # Ray's generator of what an engine answers to one call


class EnginePool:
    """`rollout.num_engines` engines of one model, in the seats that the cluster has reserved.

    Construction returns at once; `start` waits until all are ready. `graphs` says what they do beside running the model
    as it is. `bring` gives a replaced engine its weights, and lets it serve; it is called in a thread.
    """

    bring: Callable[[Member], None]

    def __init__(self, cluster: Cluster, options: EngineOptions, detokenize: Callable[[Sequence[int]], str]) -> None:
        rollout = options.rollout
        check_graphs(rollout, on_gpu=options.on_gpu)
        graphs, self.graphs = graphs_of(rollout, on_gpu=options.on_gpu)
        self._has_graphs = options.on_gpu and graphs != "none"
        self.tensor, self.dtype = rollout.tensor, options.dtype
        self.max_num_seqs, self.detokenize = rollout.max_num_seqs, detokenize
        self._cluster, self._options, self._heartbeat = cluster, options, rollout.heartbeat_seconds
        self._seats = cluster.reservation.placement.engines
        threads = cluster.threads(self._seats, rollout.tensor)
        self._environments = [
            environment(
                rollout, gpus=seat.gpus, threads=threads, dtype=options.dtype, socket_folder=cluster.socket_folder
            )
            for seat in self._seats
        ]
        self.bring = lambda member: self.serve([member])
        self._num_replaced = 0
        self._name, self._starts = uuid.uuid4().hex[:8], itertools.count()  # a session may have several pools
        self._changed = threading.Condition()  # guards the members, and what is written below it
        self._num_starting, self._may_start = 0, True
        self._closing = threading.Event()
        self._error: Exception | None = None  # that keeps an engine from being replaced
        self._not_brought: Exception | None = None  # that kept one from being given its weights
        self._streams: dict[Stream, Member] = {}
        self._heard: dict[Stream, float] = {}  # when each had its last answer, or began
        self._drawing: dict[int, Member] = {}  # by index, the last that was let serve: it may have ended
        self._members = [self._member(index) for index in range(rollout.num_engines)]

    def _member(self, index: int, num_ends: int = 0) -> Member:
        """Begin to start the engine of an index."""
        log = f"engine-{self._name}-{next(self._starts)}"
        actor = self._cluster.actor(
            "engine",
            index,
            EngineActor,
            env=self._environments[index],
            seat=self._seats[index],
            concurrency=1000,
            log=log,
            options=self._options,
        )
        return Member(index, actor, log, num_ends)

    def __len__(self) -> int:
        return len(self._members)

    def phase(self) -> str:
        """Return what the first engine that can't generate yet is doing."""
        members = {member.starting: member for member in self._members}
        _, starting = ray.wait(list(members), num_returns=len(members), timeout=0)
        if not starting:
            return ""
        member, words = members[starting[0]], "starting its process"
        with contextlib.suppress(ClusterError):  # it has not begun, or its node has just ended
            words = self._cluster.beside(member.actor, phase, member.log, self._has_graphs)
        return f"engine {member.index}: {words}"

    def start(self) -> None:
        """Wait until every engine can generate; from then on those that end are replaced."""
        answers = self._cluster.wait(
            "engines: start", [member.starting for member in self._members], self._cluster.timeout_seconds
        )
        for left_out in dict.fromkeys(text for answer in answers for text in answer):
            _LOG.warning("not passed on to the engines: %s", left_out)
        self._note_starts(self._members)
        self.serve(self._members)
        arguments = self._cluster.wait, self.running, self.replace, self._heartbeat / 2, self._closing
        threading.Thread(target=watch, args=arguments, daemon=True).start()

    def _note_starts(self, members: Sequence[Member]) -> None:
        self._cluster.remember_shared_files()
        self._cluster.remember_processes([member.actor for member in members])
        for member in members:
            member.runs = True

    def serving(self) -> list[int]:
        """Return the engines that may be asked for something now. Raises what keeps one from being replaced."""
        if error := self._error or self._not_brought:
            raise error
        return [member.index for member in self._members if member.serves]

    def generate(self, engine: int, requests: Sequence[tuple[int, Request]], sampling: SamplingConfig) -> Stream:
        """Hand (tag, request) pairs to an engine and return at once; `responses` hears of them, each once.

        One that takes its place meanwhile does not get them: it may not have its weights yet.
        """
        member = self._drawing[engine]
        stream = self._begin(member, lambda actor: actor.generate(requests, sampling), num_returns="streaming")
        self._streams[stream], self._heard[stream] = member, time.monotonic()
        return stream

    def responses(self, streams: Collection[Stream], seconds: float) -> list[tuple[Stream, list[Response] | None]]:
        """Wait at most so long for the first stream to have something, and return what each has that does by then.

        None: it has ended, with its last answer, or because its engine has: then that is being replaced, as is one that
        has answered nothing for as long as a call may take.
        """
        if not ray.wait(list(streams), num_returns=1, timeout=seconds)[0]:
            self.serving()
            self._replace_silent(streams)
            return []
        # Ray looks at all streams each time, and there may be thousands: a look is for all that come together.
        ready: list[Stream] = ray.wait(list(streams), num_returns=len(streams), timeout=_TOGETHER_SECONDS)[0]
        news: dict[Stream, Any] = dict.fromkeys(ready)
        answers = {stream: reference for stream in ready if (reference := next(stream, None)) is not None}
        for stream, answer in answers_of(self._cluster.wait, "engines: generate", answers).items():
            member = self._streams[stream]
            if not isinstance(answer, ClusterError):
                news[stream], member.num_ends, self._heard[stream] = answer, 0, time.monotonic()
            elif not self._is_lost(member, answer):
                raise answer
        self.forget([stream for stream in ready if news[stream] is None])
        self._replace_silent(stream for stream in streams if stream not in news)
        if len(streams) == 1 and not answers:
            self._cluster.remember_shared_files()  # the first requests make some
        return list(news.items())

    def forget(self, streams: Collection[Stream]) -> None:
        """Hear that nobody waits for these any more."""
        for stream in streams:
            self._streams.pop(stream, None)
            self._heard.pop(stream, None)

    def _replace_silent(self, streams: Iterable[Stream]) -> None:
        limit = self._cluster.call_timeout_seconds
        for stream in streams:
            if time.monotonic() - self._heard[stream] > limit:
                member = self._streams[stream]
                words = f"is well, but has answered nothing for {limit:.0f} s of what it was asked at once; raise"
                self.replace(member, f"engine {member.index} {words} cluster.call_timeout_seconds if it needs longer")

    def running(self) -> list[Member]:
        """Return the engines that can be given weights now."""
        return [member for member in self._members if member.runs and not member.is_lost]

    def serve(self, members: Sequence[Member]) -> None:
        """Let engines draw that have the weights to draw with."""
        with self._changed:
            for member in members:
                if not member.is_lost:  # else another may draw in its place by now
                    member.serves = True
                    self._drawing[member.index] = member

    def places(self, members: Sequence[Member]) -> list[list[Place]]:
        """Return where the weights of each engine's workers are."""
        pairs = self._all(members, lambda engine: engine.places())
        return [[Place(memory=memory, device=device) for memory, device in workers] for workers in pairs.values()]

    def open_update(self, init_info: dict[str, Any], members: Sequence[Member]) -> bool:
        """Prepare these engines for updates, each as the one that it is of them; return whether they all are."""
        with taking_weights(members):
            calls = {
                member: self._begin(
                    member, lambda engine, number=number: engine.open_update(init_info | {"engine": number})
                )
                for number, member in enumerate(members)
            }
            return len(self._answers("engines: open_update", calls)) == len(calls)

    def update(self, version: int, members: Sequence[Member], sending: Sequence[Any]) -> list[Member]:
        """Make engines take over the weights that the calls `sending` send; return those that have, at the end of all.

        One that has failed draws nothing more until an update succeeds. Raises what ended a rank.
        """
        with taking_weights(members):
            calls = {member: self._begin(member, lambda engine: engine.update(version)) for member in members}
            answers = answers_of(self._cluster.wait, "publish", calls)
        have, failures = [], []
        for member, answer in answers.items():
            if not isinstance(answer, ClusterError):
                have.append(member)
                continue
            member.serves = False
            if not self._is_lost(member, answer):
                failures.append(cause_of(answer))
        try:
            self._cluster.wait("publish", sending)
        except ClusterError as error:
            if isinstance(error, ActorLost) or len(have) == len(calls):
                raise
            failures.append(cause_of(error))
        if failures:
            _LOG.warning("an update to version %d failed: %s", version, "; ".join(failures))
        return have

    @property
    def stall_seconds(self) -> float:
        """How long a transfer to engines may stand still: less than what makes one that waits in it count as hung."""
        return max(_LEAST_STALL_SECONDS, self._heartbeat / 2)

    def sleep(self) -> dict[int, int]:
        """Make every engine that runs give its memory back, and return the bytes of each; see Engine.sleep."""
        returned = self._all(self.running(), lambda engine: engine.sleep())
        return {member.index: num_bytes for member, num_bytes in returned.items()}

    def wake(self, part: Literal["weights", "kv_cache"]) -> None:
        """Make every engine that runs take a part of its memory again."""
        self._all(self.running(), lambda engine: engine.wake(part))

    def drop_requests(self) -> None:
        """End what every engine is drawing, without an answer: nobody waits for it any more."""
        self._all(self.running(), lambda engine: engine.drop_requests())

    def open_audit(self, config: dict[str, Any], dtype: str, members: Sequence[Member]) -> None:
        """Prepare engines to be audited on what they loaded by themselves, until `open_update`; see conversion.vllm."""
        self._all(members, lambda engine: engine.open_audit(config, dtype))

    def audit(self, version: int, members: Sequence[Member]) -> dict[Member, list[dict[str, Any]]]:
        """Return, of each engine that has not ended, each worker's digests of the weights it holds; conversion.vllm."""
        return self._all(members, lambda engine: engine.audit(version))

    def digest_rows(self, member: Member, worker: int, index: int) -> list[int]:
        """Return the digests of the rows of one part that a worker holds."""
        call = self._begin(member, lambda engine: engine.digest_rows(index))
        return self._cluster.wait("engines: digest_rows", [call])[0][worker]

    def _is_lost(self, member: Member, error: ClusterError) -> bool:
        """Whether a call failed because its engine is of no more use; then it is being replaced."""
        if not isinstance(error, ActorLost):
            try:
                self._cluster.wait("engines: beat", [member.actor.beat.remote()], self._heartbeat)
                return member.is_lost
            except ClusterError:
                pass
        self.replace(member, cause_of(error))
        return True

    def replace(self, member: Member, cause: str) -> None:
        """Begin to put another engine in the place of one that is of no more use, and say why."""
        with self._changed:
            if member.is_lost or self._closing.is_set():
                return
            member.is_lost, member.serves = True, False
        threading.Thread(target=self._replace, args=(member, cause), daemon=True).start()

    def _replace(self, member: Member, cause: str) -> None:
        """Thread: put another engine in the place of one that is lost; `serving` raises what keeps it from that."""
        began, index = time.monotonic(), member.index
        _LOG.warning("%s; it is being replaced", cause)
        try:
            self._cluster.end([member.actor])
            if member.num_ends + 1 >= _MOST_ENDS:
                raise ClusterError(
                    f"engine {index} has ended {_MOST_ENDS} times, and answered nothing in between: it is not replaced "
                    f"again. The output of its processes lies in {self._cluster.logs_of(member.actor)}\n{cause}"
                )
            if not self._wait_to_start():
                return
            try:
                self._start_again(index, member.num_ends + 1, began)
            finally:
                with self._changed:
                    self._num_starting -= 1
                    self._changed.notify_all()
        except Exception as error:
            if not self._closing.is_set():
                self._error = error

    def _wait_to_start(self) -> bool:
        """Wait until an engine may start; False: none is to."""
        with self._changed:
            self._changed.wait_for(lambda: self._may_start or self._closing.is_set())
            self._num_starting += not self._closing.is_set()
            return not self._closing.is_set()

    def _start_again(self, index: int, num_ends: int, began: float) -> None:
        fresh = self._members[index] = self._member(index, num_ends)
        try:
            self._cluster.wait(f"engine {index}: start", [fresh.starting], self._cluster.timeout_seconds)
        except ClusterError as error:
            self.replace(fresh, cause_of(error))
            return
        self._note_starts([fresh])
        with self._changed:
            self._num_replaced += 1
        try:
            self.bring(fresh)
        except Exception as error:
            self._not_brought = error
            return
        _LOG.warning("engine %d: replaced in %.0f s", index, time.monotonic() - began)

    def hold_back(self) -> None:
        """Let no engine start from now on, as others need the memory; returns when those have that are about to."""
        with self._changed:
            self._may_start = False
            self._changed.wait_for(lambda: not self._num_starting)

    def let_start(self) -> None:
        """Let engines start again that take a lost one's place; at first they may."""
        with self._changed:
            self._may_start = True
            self._changed.notify_all()

    def go_on(self) -> None:
        """Forget what kept an engine from being given its weights: the policy is another now, and gives them to all."""
        self._not_brought = None

    def num_replaced(self) -> int:
        """Return how many engines have been replaced since the last call."""
        with self._changed:
            count, self._num_replaced = self._num_replaced, 0
        return count

    def let_go(self) -> None:
        """Replace no engine any more: they are about to be ended."""
        with self._changed:
            self._closing.set()
            self._changed.notify_all()

    def close(self) -> None:
        self.let_go()
        self._cluster.remember_shared_files()  # an engine may be about to start
        calls = [self._begin(member, lambda engine: engine.close()) for member in self._members if not member.is_lost]
        self._cluster.close("engines: close", calls)

    def _all[T](self, members: Sequence[Member], call: Callable[[Engine], Awaitable[T]]) -> dict[Member, T]:
        """Make the call on engines at once and return the answers; one that is lost has none."""
        calls = {member: self._begin(member, call) for member in members}
        return self._answers(f"engines: {Call.of(call).method}", calls)

    def _answers(self, action: str, calls: Mapping[Member, Any]) -> dict[Member, Any]:
        answers = answers_of(self._cluster.wait, action, calls)
        for member, answer in list(answers.items()):
            if isinstance(answer, ClusterError):
                if not self._is_lost(member, answer):
                    raise answer
                del answers[member]
        return answers

    def _begin(self, member: Member, call: Callable[[Engine], Any], num_returns: int | str = 1) -> Any:
        heard = Call.of(call)
        method = getattr(member.actor, heard.method).options(num_returns=num_returns)
        return method.remote(*heard.arguments)
