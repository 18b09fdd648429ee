"""Requests in, scored rollouts out, with engines made by hand; tests/e2e has real ones."""

import dataclasses
import gc
import itertools
import math
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import pytest
from fake_engines import FakeEngines

from astar_megatron.algorithm.rewards import RewardError
from astar_megatron.cluster.errors import ClusterError
from astar_megatron.config import RewardConfig, RolloutConfig, SamplingConfig
from astar_megatron.data.prompts import PromptStream
from astar_megatron.rollout.scoring import Indexed, Pending, Scorer
from astar_megatron.rollout.source import RolloutSource
from astar_megatron.rollout.training import TrainingRollouts
from astar_megatron.types import Prompt, Request, Rollout

PROMPTS = [Prompt(uid=f"u{i}", token_ids=(1, i), text="", answer=str(i)) for i in range(30)]


def request(index: int, sample: int = 0) -> Request:
    return Request(prompt=PROMPTS[index % len(PROMPTS)], sample=sample, seed=index)


def engines(**options: Any) -> FakeEngines:
    """They answer a prompt's seed, which is right where it is the prompt's own number."""
    return FakeEngines(lambda asked: (tuple(str(asked.seed).encode()), asked.sample > 0), **options)


@pytest.fixture
def source_of(tmp_path: Path) -> Iterator[Callable[..., RolloutSource]]:
    """Return a function from engines to a source, closed at the end of the test."""
    sources = []

    def make(pool: Any, reward: str = "last_number") -> RolloutSource:
        sources.append(RolloutSource(pool, SamplingConfig(), RewardConfig(name=reward, max_failures=0), tmp_path))
        return sources[-1]

    yield make
    for source in sources:
        source.__exit__()


def wait_for(condition: Callable[[], object]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_nothing_keeps_rollouts_that_the_driver_has_let_go(source_of: Any) -> None:
    """Python looks for what keeps itself alive after hundreds of steps, each of which may have gigabytes of them."""
    source, gone = source_of(engines(num_engines=2, max_num_seqs=4)), list[Any]()
    gc.collect()
    gc.disable()
    try:
        draw = source.ask([request(index) for index in range(50)])
        gone.append(weakref.ref(draw))
        assert len(draw.rollouts()) == 50
        del draw
        wait_for(lambda: gone[0]() is None)
    finally:
        gc.enable()


def test_each_draw_gets_its_rollouts_scored_in_the_order_of_its_requests(source_of: Any) -> None:
    source = source_of(engines(num_engines=3, max_num_seqs=4))
    draws = [
        source.ask([request(index, sample) for index in range(count)]) for count, sample in ((50, 0), (7, 1), (0, 0))
    ]
    first, second, none = (draw.rollouts() for draw in draws)
    assert [rollout.seed for rollout in first] == list(range(50)) and [rollout.seed for rollout in second] == list(
        range(7)
    )
    assert [rollout.reward for rollout in first] == [1.0] * 30 + [0.0] * 20
    assert [rollout.text for rollout in second] == [str(index) for index in range(7)]
    assert {rollout.truncated for rollout in first} == {False} and {rollout.truncated for rollout in second} == {True}
    assert first[17].logprob == -0.5 * 2 and none == []
    for draw in draws:
        draw.wait_for_engines()  # at once: they have answered


def test_the_engines_are_fed_while_the_driver_does_something_else(source_of: Any) -> None:
    pool = engines(max_num_seqs=3, at_once=2)
    draw = source_of(pool).ask(request(index) for index in range(100))
    wait_for(lambda: len(pool.asked) == 100)  # far more than they take at once
    assert len(draw.rollouts()) == 100


def test_a_stream_takes_requests_as_there_is_room_for_them_and_never_ends_by_itself(source_of: Any) -> None:
    taken = itertools.count()
    pool = engines(max_num_seqs=5, at_once=3)
    stream = source_of(pool).stream(request(next(taken)) for _ in itertools.count())
    drawn = 0
    for rollouts in itertools.islice(stream, 40):
        drawn += len(rollouts)
        time.sleep(0.01)  # slower than the engines
    assert drawn >= 40 and next(taken) <= len(pool.answered) + 2 * 5  # what is with the engines


def test_engines_do_not_wait_for_a_slow_reward(source_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow.py").write_text("import time\ndef reward(response, answer):\n    time.sleep(2)\n    return 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    pool = engines(max_num_seqs=5, at_once=3)
    stream = source_of(pool, "slow:reward").stream(request(index) for index in range(200))
    assert next(stream)
    assert len(pool.answered) > 190  # all but what is on its way, by the time that the first is scored


def test_what_several_engines_answer_at_once_is_scored_together(
    source_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a thousand engines a step would be thousands of small parts for the reward's processes."""
    sizes, submit = [], Scorer.submit

    def counted(scorer: Scorer, rollouts: Indexed) -> Pending:
        sizes.append(len(rollouts))
        return submit(scorer, rollouts)

    monkeypatch.setattr(Scorer, "submit", counted)
    pool = engines(num_engines=3, at_once=2, streams_at_once=3, max_num_seqs=2)
    source = source_of(pool)
    with source.drained():  # so that all three have something when they are asked
        drawn = source.ask(request(index) for index in range(6))
    rollouts = list(drawn.rollouts())
    assert [rollout.reward for rollout in rollouts] == [1.0] * 6
    assert sizes == [6] and len({stream for stream, _ in pool.answered}) == 3


def test_a_stream_ends_with_its_requests_and_yields_each_once(source_of: Any) -> None:
    source = source_of(engines(num_engines=2, max_num_seqs=3))
    for count in (0, 1, 61):
        seeds = [rollout.seed for rollouts in source.stream(map(request, range(count))) for rollout in rollouts]
        assert sorted(seeds) == list(range(count))


def test_what_ends_an_engine_is_raised_where_the_driver_waits_and_at_each_later_question(source_of: Any) -> None:
    def answer(asked: Request) -> Any:
        if asked.seed == 11:
            raise ConnectionError("engine 0 ended")
        return (55,), False

    source = source_of(FakeEngines(answer, at_once=2))
    draws = [source.ask([request(index) for index in range(first, first + 9)]) for first in (0, 9)]
    for draw in draws:
        draw.wait_for_engines()
    with pytest.raises(ConnectionError, match="engine 0 ended"):
        draws[1].rollouts()
    with pytest.raises(ConnectionError, match="engine 0 ended"):
        source.ask([request(0)])


def test_a_response_that_can_t_be_read_ends_the_wait_for_it(source_of: Any) -> None:
    draw = source_of(FakeEngines(lambda asked: ((255,), False))).ask([request(0)])  # no text in UTF-8
    draw.wait_for_engines()
    with pytest.raises(UnicodeDecodeError):
        draw.rollouts()


@pytest.mark.parametrize("logprob", [math.nan, -math.inf])
def test_a_log_prob_that_is_no_number_ends_the_run_by_its_engine_and_prompt(source_of: Any, logprob: float) -> None:
    draw = source_of(engines(logprob=logprob)).ask([request(11, 1)])
    with pytest.raises(ClusterError, match=rf"^engine 0 drew 2 of 2 tokens .*: {logprob} \(prompt u11, sample 1, "):
        draw.rollouts()


def test_what_was_scored_before_an_error_is_yielded_before_it_is_raised(source_of: Any) -> None:
    def answer(asked: Request) -> Any:
        if asked.seed == 11:
            time.sleep(1.0)  # until the others are scored
            raise ConnectionError("engine 0 ended")
        return (55,), False

    pool = FakeEngines(answer, at_once=1)
    source = source_of(pool)
    source.ask([request(12)]).rollouts()  # from now on the reward's process runs
    pool.answered.clear()
    stream, drawn = source.stream(request(index) for index in range(12)), 0
    with pytest.raises(ConnectionError, match="engine 0 ended"):
        for rollouts in stream:
            drawn += len(rollouts)
            time.sleep(2.0)
    order = [request.seed for _, request in pool.answered]
    assert drawn == order.index(11) > 0


def test_what_can_t_be_scored_ends_the_run_where_the_driver_waits(source_of: Any) -> None:
    with pytest.raises(RewardError, match="no_such_module"):
        source_of(engines(), "no_such_module:reward").ask([request(0)]).rollouts()
    wordless = Request(prompt=Prompt(uid="u", token_ids=(1,), text="", answer="Paris"), sample=0, seed=0)
    with pytest.raises(RewardError, match="expected a number, got 'Paris'"):
        source_of(engines()).ask([wordless]).rollouts()


def test_what_an_engine_had_when_it_ended_is_asked_again_with_its_seeds(source_of: Any) -> None:
    """Of the others at once, and of itself when it is back; nothing is lost, nothing is answered twice."""
    pool = engines(num_engines=3, max_num_seqs=4, at_once=1, seconds=0.002)
    draw = source_of(pool).ask(request(index) for index in range(200))
    for engine in (0, 2, 0):
        count = len(pool.answered)
        wait_for(lambda count=count: len(pool.answered) > count + 20)
        pool.end(engine)
        asked = len(pool.asked)
        time.sleep(0.1)
        assert all(other != engine for other, _ in pool.asked[asked + 1 :])  # the first may have been on its way
        pool.join(engine)
    rollouts = draw.rollouts()
    assert [rollout.seed for rollout in rollouts] == list(range(200))
    assert [rollout.text for rollout in rollouts] == [str(index) for index in range(200)]
    assert len(pool.asked) > 200 == len(pool.answered)


def test_requests_wait_while_no_engine_is_there(source_of: Any) -> None:
    pool = engines(num_engines=2, max_num_seqs=4)
    source = source_of(pool)
    for engine in range(2):
        pool.end(engine)
    draw, stream = source.ask(map(request, range(9))), source.stream(map(request, range(30)))
    threading.Timer(0.5, pool.join, [1]).start()
    assert len([rollout for rollouts in stream for rollout in rollouts]) == 30  # it does not end for want of an engine
    assert [rollout.seed for rollout in draw.rollouts()] == list(range(9))
    assert {engine for engine, _ in pool.asked} == {1}


def test_a_request_with_which_engines_end_again_and_again_ends_the_run_by_its_prompt(source_of: Any) -> None:
    pool = engines(max_num_seqs=4, at_once=1)

    def answer(asked: Request) -> Any:
        if asked.prompt.uid == "u2":
            pool.end(0)
            threading.Timer(0.05, pool.join, [0]).start()
            raise ConnectionError
        return (55,), False

    respond, pool._answer = pool.responses, answer

    def responses(streams: Any, seconds: float) -> Any:
        try:
            return respond(streams, seconds)
        except ConnectionError:
            return []

    pool.responses = responses  # type: ignore[method-assign]
    draw = source_of(pool).ask(map(request, range(4)))
    with pytest.raises(ClusterError, match=r"engine 0 ended, as 2 before it did with the same request.* prompts: .*u2"):
        draw.rollouts()


def test_a_drained_source_has_no_engine_left_that_ended(source_of: Any) -> None:
    pool = engines(num_engines=2, max_num_seqs=3, at_once=1, seconds=0.01)
    source = source_of(pool)
    draw = source.ask(map(request, range(60)))
    wait_for(lambda: len(pool.answered) > 5)
    pool.end(0)
    with source.drained():
        asked = len(pool.asked)
        pool.join(0)
        time.sleep(0.3)
        assert len(pool.asked) == asked
        pool.version = 1
    assert {(r.first_version, r.last_version) for r in draw.rollouts()} == {(0, 0), (1, 1)}


def test_a_source_is_left_while_engines_are_busy(source_of: Any) -> None:
    before = threading.active_count()
    with source_of(engines(seconds=0.05)) as source:
        source.ask(map(request, range(1000)))
    assert threading.active_count() == before


def untimed(name: str) -> AbstractContextManager[None]:
    return nullcontext()


def training(
    source: RolloutSource,
    state: dict[str, Any] | None = None,
    *,
    first: int = 0,
    max_staleness: int = 0,
    update: Literal["in_flight", "drain"] = "in_flight",
    group_size: int = 1,
    drawn: Sequence[Rollout] = (),
) -> TrainingRollouts:
    prompts = PromptStream(PROMPTS, 7, 3)
    if state is not None:
        prompts.restore(state)
    rollout = RolloutConfig(max_staleness=max_staleness, update=update)
    return TrainingRollouts(source, prompts, rollout, 5, versions=range(first, 6), group_size=group_size, drawn=drawn)


@pytest.mark.parametrize("max_staleness", [0, 1, 2, 9])
def test_batches_are_asked_for_as_far_ahead_as_allowed_and_are_the_same(source_of: Any, max_staleness: int) -> None:
    ahead_pool, pool = engines(), engines()
    ahead, batches = training(source_of(ahead_pool), max_staleness=max_staleness), training(source_of(pool))
    for version in range(6):
        pool.version = ahead_pool.version = version
        early, rollouts = ahead.take(version, untimed), batches.take(version, untimed)
        assert [rollout.seed for rollout in early] == [rollout.seed for rollout in rollouts]
        assert {(rollout.first_version, rollout.last_version) for rollout in rollouts} == {(version, version)}
        num_asked = 7 * min(6, version + max_staleness + 1)
        wait_for(lambda num_asked=num_asked: len(ahead_pool.asked) == num_asked)
        assert ahead.state() == batches.state()  # so what was asked for ahead is asked for again after a resume
    assert [request.seed for _, request in ahead_pool.asked] == [request.seed for _, request in pool.asked]


@pytest.mark.parametrize(
    ("others", "counts"), [((-1.0, -0.5, 1.0), -1.0), ((0.0, 0.5, 1.0), 0.0), ((0.5, 1.0, 1.0), 0.0), ((), 0.0)]
)
def test_what_could_not_be_scored_counts_as_the_lowest_reward_of_its_step_and_at_most_0(
    source_of: Any, others: tuple[float, ...], counts: float
) -> None:
    unscored = training(source_of(engines())).take(0, untimed)
    rewards = [*others, *[None] * (len(unscored) - len(others))]
    drawn = [dataclasses.replace(rollout, reward=reward) for rollout, reward in zip(unscored, rewards, strict=True)]
    batch = training(source_of(engines()), drawn=drawn).take(0, untimed)
    assert [rollout.score for rollout in batch] == [counts if reward is None else reward for reward in rewards]
    assert [rollout.reward for rollout in batch] == rewards  # so that no value learns from it
    assert {rollout.score for rollout in drawn if rollout.reward is None} == {0.0}  # as evaluation has them


def test_a_resumed_run_asks_for_the_batches_that_were_not_taken(source_of: Any) -> None:
    whole, resumed = engines(), engines()
    batches = training(source_of(whole), max_staleness=2)
    for version in range(4):
        whole.version = version
        batches.take(version, untimed)
    resumed.version = 4
    training(source_of(resumed), batches.state(), first=4, max_staleness=4).take(4, untimed)
    wait_for(lambda: len(resumed.asked) == 2 * 7)
    assert [request.seed for _, request in resumed.asked] == [request.seed for _, request in whole.asked[4 * 7 :]]


def test_what_was_drawn_ahead_is_not_drawn_again_by_a_resumed_run(source_of: Any) -> None:
    whole, resumed = engines(num_engines=2, at_once=2, seconds=0.01), engines()
    batches = training(source_of(whole), max_staleness=3)
    for version in range(2):
        whole.version = version
        batches.take(version, untimed)
    state = batches.state()
    wait_for(lambda: len(whole.answered) >= 2 * 7 + 9)
    drawn = batches.in_flight()
    assert 9 <= len(drawn) <= 3 * 7
    resumed.version = 2
    again = training(source_of(resumed), state, first=2, max_staleness=3, drawn=drawn)
    for version in range(2, 6):
        whole.version = resumed.version = version
        kept, expected = again.take(version, untimed), batches.take(version, untimed)
        assert [rollout.seed for rollout in kept] == [rollout.seed for rollout in expected]
        assert [rollout for rollout in kept if rollout in drawn] == [
            rollout for rollout in expected if rollout in drawn
        ]
    assert not {request.seed for _, request in resumed.asked} & {rollout.seed for rollout in drawn}
    assert len(resumed.asked) + len(drawn) == 4 * 7


def test_a_run_that_is_resumed_twice_still_has_what_the_first_one_drew_ahead(source_of: Any) -> None:
    pool, resumed = engines(), engines()
    batches = training(source_of(pool), max_staleness=3)
    batches.take(0, untimed)
    wait_for(lambda: len(batches.in_flight()) == 3 * 7)
    drawn = batches.in_flight()
    resumed.version = 1
    again = training(source_of(resumed), batches.state(), first=1, max_staleness=3, drawn=drawn)
    assert again.take(1, untimed) == drawn[:7]
    assert again.in_flight()[: 2 * 7] == drawn[7:]


@pytest.mark.parametrize("last_version", [0, 1])  # 1: weights were published while it was drawn
def test_what_was_drawn_ahead_by_weights_that_are_too_old_now_is_drawn_again(source_of: Any, last_version: int) -> None:
    pool, resumed = engines(), engines()
    batches = training(source_of(pool), max_staleness=3)
    batches.take(0, untimed)
    wait_for(lambda: len(batches.in_flight()) == 3 * 7)
    drawn = [dataclasses.replace(rollout, last_version=last_version) for rollout in batches.in_flight()]
    resumed.version = 1
    again = training(source_of(resumed), batches.state(), first=1, max_staleness=1, drawn=drawn)
    assert {rollout.first_version for rollout in again.take(1, untimed)} == {0}
    wait_for(lambda: len(resumed.asked) == 7)  # batch 2: version 0 is two behind


@pytest.mark.parametrize(("drawn_by", "version", "max_staleness"), [(3, 2, 9), (0, 1, 0), (1, 4, 2)])
def test_rollouts_of_later_weights_or_of_too_early_ones_are_refused(
    source_of: Any, drawn_by: int, version: int, max_staleness: int
) -> None:
    pool = engines()
    pool.version = drawn_by
    batches = training(source_of(pool), first=version, max_staleness=max_staleness)
    with pytest.raises(AssertionError, match=f"rollouts of versions {drawn_by} to {drawn_by} for version {version}, "):
        batches.take(version, untimed)


@pytest.mark.parametrize("update", ["in_flight", "drain"])
def test_weights_are_published_where_no_request_is_in_flight_if_that_is_asked_for(source_of: Any, update: Any) -> None:
    pool = engines(max_num_seqs=3, at_once=1, seconds=0.1)
    batches = training(source_of(pool), max_staleness=3, update=update)
    batches.take(0, untimed)
    with batches.while_publishing():
        in_flight = len(pool.asked) - len(pool.answered)
        asked = len(pool.asked)
        time.sleep(0.2)
        assert (len(pool.asked) > asked) == (update == "in_flight") == (in_flight > 0)
        pool.version = 1
    rollouts = batches.take(1, untimed)
    versions = {(rollout.first_version, rollout.last_version) for rollout in rollouts}
    assert versions <= {(0, 0), (1, 1)} if update == "drain" else (0, 0) in versions


def test_the_responses_of_a_group_lie_beside_each_other_with_seeds_of_their_own(source_of: Any) -> None:
    rollouts = training(source_of(engines(num_engines=2)), group_size=3).take(0, untimed)
    uids = [rollout.prompt.uid for rollout in rollouts]
    assert len(rollouts) == 7 * 3 and uids[::3] == uids[1::3] == uids[2::3] and len(set(uids)) == 7
    assert [rollout.sample for rollout in rollouts[:6]] == [0, 1, 2, 0, 1, 2]
    assert len({rollout.seed for rollout in rollouts}) == 21


def test_a_source_says_how_long_its_engines_had_nothing_to_do(source_of: Any) -> None:
    source = source_of(engines(num_engines=2, seconds=0.05))
    time.sleep(0.5)
    assert source.take_idle_seconds() >= 0.5
    source.ask(map(request, range(200))).rollouts()
    busy = source.take_idle_seconds()
    time.sleep(1.0)
    assert source.take_idle_seconds() > 1.0 > busy
