"""Queues of engines: never dry while there is work, never all of it, a prompt's samples in one place."""

import random
import time

from hypothesis import given, settings
from hypothesis import strategies as st

from astar_megatron.rollout.feed import Feed, Item, _shares
from astar_megatron.types import Prompt, Request


def items(num_prompts: int, samples: int) -> list[Item]:
    prompts = [Prompt(uid=f"u{i}", token_ids=(i,), text="", answer="") for i in range(num_prompts)]
    requests = [Request(prompt=prompt, sample=n, seed=0) for prompt in prompts for n in range(samples)]
    return list(enumerate(requests))


@settings(deadline=None)
@given(
    num_prompts=st.integers(0, 60),
    samples=st.integers(1, 9),
    num_engines=st.integers(1, 4),
    max_num_seqs=st.integers(1, 12),
    at_once=st.booleans(),
    seed=st.integers(0, 5),
)
def test_everything_is_answered_once_and_no_engine_starves(
    num_prompts: int, samples: int, num_engines: int, max_num_seqs: int, at_once: bool, seed: int
) -> None:
    """Whether all is asked for at once, or as there is room."""
    chance, asked, whole = random.Random(seed), 0, items(num_prompts, samples)
    feed, answered = Feed(num_engines, max_num_seqs), []
    queues: list[list[int]] = [[] for _ in range(num_engines)]
    while True:
        while asked < len(whole) and (at_once or feed.room()):
            fresh = whole[asked:] if at_once else whole[asked : asked + feed.room()]
            feed.ask(fresh)
            asked += len(fresh)
            if not at_once:
                assert asked <= len(answered) + num_engines * (2 * max_num_seqs + samples)
            for engine, share in feed.due(range(num_engines)):
                assert all(whole[tag] == (tag, request) for tag, request in share)
                queues[engine] += [tag for tag, _ in share]
        for engine, share in feed.due(range(num_engines)):
            queues[engine] += [tag for tag, _ in share]
        if not any(queues):
            break
        if sum(map(len, queues)) + len(answered) < len(whole):  # there is more: each has some behind what it decodes
            assert min(map(len, queues)) > max_num_seqs
        assert max(map(len, queues)) <= 2 * max_num_seqs + samples  # a prompt's samples are not split
        engine = chance.choice([i for i, queue in enumerate(queues) if queue])
        tag = queues[engine].pop(chance.randrange(min(max_num_seqs, len(queues[engine]))))
        assert feed.answered(engine, tag) == whole[tag][1]
        answered.append(tag)
    assert sorted(answered) == list(range(len(whole)))


def test_a_feed_says_from_when_to_when_any_engine_had_a_request() -> None:
    feed, start = Feed(2, 4), time.perf_counter()
    assert feed.take_busy() == []
    feed.ask(items(2, 1))
    tags = {engine: share[0][0] for engine, share in feed.due(range(2))}
    ((begun, now),) = feed.take_busy()  # both still are
    assert start < begun <= now <= time.perf_counter()
    feed.answered(0, tags[0])
    feed.answered(1, tags[1])
    ended = time.perf_counter()
    ((again, end),) = feed.take_busy()
    assert again == now <= end <= ended and feed.take_busy() == []


def test_a_small_batch_is_spread_over_the_engines_with_a_prompts_samples_together() -> None:
    feed = Feed(2, 256)
    feed.ask(items(7, 3))
    shares = dict(feed.due(range(2)))
    assert sorted(map(len, shares.values())) == [9, 12]
    assert not {request.prompt.uid for _, request in shares[0]} & {request.prompt.uid for _, request in shares[1]}


def test_what_an_engine_had_when_it_ended_goes_first_and_to_those_that_are_left() -> None:
    feed, whole = Feed(2, 4), items(40, 1)
    feed.ask(whole)
    shares = dict(feed.due([0, 1]))
    assert feed.answered(1, (first := shares[1][0])[0]) == first[1]
    lost = shares[1][1:]
    assert feed.give_back(1, [tag for tag, _ in lost]) == 1
    assert feed.due([0]) == [] and feed.due([]) == []  # the other has enough, and nobody else is there
    assert feed.room() == 0
    for tag, _ in shares[0]:
        feed.answered(0, tag)
    ((engine, again),) = feed.due([0])
    assert engine == 0 and again[: len(lost)] == lost and len(again) == 8
    ((engine, more),) = feed.due([0, 1])  # it is back, with an empty queue
    assert engine == 1 and len(more) == 8
    assert feed.num_waiting == 40 - 8 - 8 - 8 - 1


def test_a_request_is_known_by_how_many_engines_have_ended_with_it() -> None:
    feed = Feed(1, 2)
    feed.ask(items(1, 3))
    for num_ends in (1, 2, 3):
        ((_, share),) = feed.due([0])
        assert feed.give_back(0, [tag for tag, _ in share]) == num_ends
        if num_ends == 2:
            feed.ask([(7, share[0][1])])
    ((_, share),) = feed.due([0])
    for tag, _ in share:
        feed.answered(0, tag)
    assert feed.give_back(0, []) == 0


@settings(deadline=None)
@given(
    samples=st.lists(st.integers(1, 5), max_size=40),
    loads=st.dictionaries(st.integers(0, 9), st.integers(0, 9), min_size=1),
)
def test_each_prompt_goes_where_the_fewest_wait_the_first_of_equals(samples: list[int], loads: dict[int, int]) -> None:
    whole = [item for i, number in enumerate(samples) for item in items(i + 1, 1)[-1:] * number]
    waiting, expected = dict(loads), {engine: [] for engine in loads}
    for i, number in enumerate(samples):
        engine = min(waiting, key=lambda engine: waiting[engine])
        waiting[engine] += number
        expected[engine] += [f"u{i}"] * number
    shares = _shares(whole, loads)
    assert {e: [request.prompt.uid for _, request in share] for e, share in shares.items()} == expected
