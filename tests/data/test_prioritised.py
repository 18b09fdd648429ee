"""The order of prompts by how much there is to learn from each."""

from collections import Counter

import pytest

from astar_megatron.data.prioritised import PrioritisedPrompts
from astar_megatron.data.prompts import PromptStream
from astar_megatron.data.rows import PromptError
from astar_megatron.types import Prompt

PROMPTS = [Prompt(uid=f"u{i:02}", token_ids=(1,), text="", answer="") for i in range(20)]
PRIORITIES = {prompt.uid: 1.0 + i for i, prompt in enumerate(PROMPTS)}


def order(batch_size: int = 3, seed: int = 7, **options: object) -> PrioritisedPrompts:
    prompts = options.pop("prompts", PROMPTS)
    return PrioritisedPrompts(prompts, batch_size, seed, lambda uids: [PRIORITIES[uid] for uid in uids], **options)  # type: ignore[arg-type]


def test_prompts_come_as_often_as_their_priorities_say() -> None:
    stream = order(batch_size=1)
    counts = Counter(stream.take()[0].uid for _ in range(4000))
    total = sum(PRIORITIES.values())
    for uid, priority in PRIORITIES.items():
        wanted = 4000 * priority / total
        assert abs(counts[uid] - wanted) < 5 * wanted**0.5, uid


def test_a_batch_holds_each_prompt_once_and_no_prompt_of_weight_0() -> None:
    stream = order(batch_size=19, weights={"u03": 0.0})
    for _ in range(5):
        uids = [prompt.uid for prompt in stream.take()]
        assert len(set(uids)) == 19 and "u03" not in uids
        assert uids == sorted(uids)  # none of its halves has more of the likelier ones


def test_a_resumed_order_goes_on_and_the_files_order_does_not_matter() -> None:
    stream, other = order(), order(prompts=PROMPTS[::-1])
    first = [stream.take() for _ in range(3)]
    other.restore(stream.state())
    assert [other.take() for _ in range(3)] == [stream.take() for _ in range(3)]
    assert first != [order(seed=8).take() for _ in range(3)] and first[0] != first[1]


def test_orders_of_other_prompts_seeds_or_kinds_are_refused() -> None:
    with pytest.raises(PromptError, match="order of prompts is of 8"):
        order().restore(order(seed=8).state())
    with pytest.raises(PromptError, match=r"data\.path: its prompts are not those"):
        order().restore(order(prompts=PROMPTS[1:]).state())
    with pytest.raises(PromptError, match=r"data\.path: its prompts are not those"):
        order().restore(order(weights={"u03": 0.5}).state())
    with pytest.raises(PromptError, match=r"objective\.name"):
        order().restore({**order().state(), "batch": None})
    with pytest.raises(PromptError):
        order().restore(PromptStream(PROMPTS, 3, 7).state())
    with pytest.raises(PromptError, match=r"train\.batch_size: expected 1 to 20"):
        order(batch_size=21)
