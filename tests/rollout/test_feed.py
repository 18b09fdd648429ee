"""Queues of engines: never dry while there is work, never all of it, a prompt's samples in one place."""

import random
from collections.abc import Iterator

from hypothesis import given, settings
from hypothesis import strategies as st

from astar_megatron.rollout.feed import Feed, Item
from astar_megatron.types import Prompt


def items(num_prompts: int, samples: int) -> list[Item]:
    prompts = [Prompt(uid=f"u{i}", token_ids=(i,), text="", answer="") for i in range(num_prompts)]
    return [(prompt, n, 0) for prompt in prompts for n in range(samples)]


@settings(deadline=None)
@given(
    num_prompts=st.integers(0, 60),
    samples=st.integers(1, 9),
    num_engines=st.integers(1, 4),
    max_num_seqs=st.integers(1, 12),
    seed=st.integers(0, 5),
)
def test_everything_is_answered_once_and_no_engine_starves(
    num_prompts: int, samples: int, num_engines: int, max_num_seqs: int, seed: int
) -> None:
    chance, asked, whole = random.Random(seed), 0, items(num_prompts, samples)

    def work() -> Iterator[Item]:
        nonlocal asked
        for item in whole:
            asked += 1
            yield item

    feed, answered = Feed(work(), num_engines, max_num_seqs), []
    queues: list[list[int]] = [[] for _ in range(num_engines)]
    while True:
        for engine, share in feed.due():
            assert all(whole[index] == item for index, item in share)
            queues[engine] += [index for index, _ in share]
        if not any(queues):
            break
        if asked < len(whole):  # there is more: each has what it decodes and some behind it
            assert min(map(len, queues)) > max_num_seqs
        assert max(map(len, queues)) <= 2 * max_num_seqs + samples  # a prompt's samples are not split
        assert asked <= len(answered) + num_engines * (2 * max_num_seqs + samples)
        engine = chance.choice([i for i, queue in enumerate(queues) if queue])
        index = queues[engine].pop(chance.randrange(min(max_num_seqs, len(queues[engine]))))
        assert feed.answered(engine, index) == whole[index]
        answered.append(index)
    assert sorted(answered) == list(range(len(whole)))


def test_a_small_batch_is_spread_over_the_engines_with_a_prompts_samples_together() -> None:
    shares = dict(Feed(items(7, 3), 2, 256).due())
    assert sorted(map(len, shares.values())) == [9, 12]
    assert not {item[0].uid for _, item in shares[0]} & {item[0].uid for _, item in shares[1]}
