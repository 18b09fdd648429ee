"""Filters: which prompts weigh less by what stage 1 says, and that the order of training follows the weights."""

from collections import Counter
from pathlib import Path

import pytest
from samples import CONTRACT
from table_rows import PROMPTS, scored

from astar_megatron.config import FilterConfig
from astar_megatron.data.filters import weights
from astar_megatron.data.prompts import PromptError, PromptStream
from astar_megatron.data.v_star import VStarTable


@pytest.fixture
def table(tmp_path: Path) -> VStarTable:
    """Prompt 0 is all wrong, 1 all right, 2 half with 4 samples, 3 half with 32, 4 and 5 one of 8 right."""
    table = VStarTable.create_or_open(tmp_path, CONTRACT)
    for place, (right, samples) in enumerate([(0, 8), (8, 8), (2, 4), (16, 32), (1, 8), (1, 8)]):
        table.append([scored(PROMPTS[place], n, float(n < right)) for n in range(samples)])
    return table


def test_by_default_nothing_is_filtered(table: VStarTable) -> None:
    assert weights(table.estimate(0.5), FilterConfig()) == {}


@pytest.mark.parametrize(
    ("cfg", "expected"),
    [
        ({"all_wrong": 0.0}, {"uid-0": 0.0}),
        ({"all_right": 0.25}, {"uid-1": 0.25}),
        ({"wide": 0.5, "max_width": 0.75}, {"uid-2": 0.5}),
        ({"all_wrong": 0.1, "wide": 0.5, "max_width": 0.3}, {"uid-0": 0.1, "uid-2": 0.5, "uid-4": 0.5, "uid-5": 0.5}),
    ],
)
def test_a_filter_weighs_the_prompts_it_is_about(
    table: VStarTable, cfg: dict[str, float], expected: dict[str, float]
) -> None:
    estimates = table.estimate(0.5)
    assert weights(estimates, FilterConfig(**cfg)) == expected, dict(zip(estimates.uids, estimates.width, strict=True))


def test_a_filter_that_leaves_nothing_is_refused(table: VStarTable) -> None:
    with pytest.raises(ValueError, match=r"none of the 6 prompts is left; raise filter\.all_wrong"):
        weights(table.estimate(0.5), FilterConfig(wide=0.0, max_width=0.01))
    for weight in (0.0, 1e-9, 0.1):  # of six prompts: epochs without a prompt would follow each other
        with pytest.raises(PromptError, match="less than one prompt an epoch; raise filter"):
            PromptStream(PROMPTS, 2, 0, dict.fromkeys((prompt.uid for prompt in PROMPTS), weight))
    assert PromptStream(PROMPTS, 2, 0, dict.fromkeys((prompt.uid for prompt in PROMPTS), 1 / 6)).take()


def test_prompts_come_in_the_share_of_epochs_that_their_weight_says() -> None:
    stream = PromptStream(PROMPTS, 1, 3, {"uid-0": 0.0, "uid-1": 0.25})
    seen: Counter[str] = Counter()
    while stream.state()["epoch"] < 400:  # type: ignore[operator]
        seen[stream.take()[0].uid] += 1
    assert seen["uid-0"] == 0
    assert 70 < seen["uid-1"] < 130  # 100 expected, 8.7 a standard deviation
    assert all(seen[f"uid-{i}"] in (400, 401) for i in (2, 3, 4, 5))


def test_the_prompts_that_stay_keep_their_order() -> None:
    whole = [prompt.uid for prompt in PromptStream(PROMPTS, 6, 0).take()]
    fewer = [prompt.uid for prompt in PromptStream(PROMPTS, 4, 0, {"uid-1": 0.0, "uid-4": 0.0}).take()]
    assert fewer == [uid for uid in whole if uid not in ("uid-1", "uid-4")]


def test_a_filtered_order_resumes_and_refuses_another_filter() -> None:
    some = {"uid-0": 0.5, "uid-1": 0.5, "uid-2": 0.5}
    stream = PromptStream(PROMPTS, 2, 0, some)
    for before in range(9):
        resumed = PromptStream(PROMPTS, 2, 0, some)
        resumed.restore(stream.state())
        ahead = PromptStream(PROMPTS, 2, 0, some)
        for _ in range(before):
            ahead.take()
        assert [p.uid for p in resumed.take()] == [p.uid for p in ahead.take()] == [p.uid for p in stream.take()]
    with pytest.raises(PromptError, match="its prompts are not those"):
        PromptStream(PROMPTS, 2, 0, some | {"uid-2": 0.4}).restore(stream.state())


def test_responses_rewarded_for_their_form_alone_are_all_wrong(tmp_path: Path) -> None:
    table = VStarTable.create_or_open(tmp_path, CONTRACT)
    for prompt, rewards in zip(PROMPTS, [(0.1, 0.1), (0.0, 0.1), (0.1, 1.0), (-1.0, 0.0)], strict=False):
        table.append([scored(prompt, n, reward) for n, reward in enumerate(rewards)])
    assert weights(table.estimate(0.5), FilterConfig(all_wrong=0.0)) == {"uid-0": 0.0, "uid-1": 0.0, "uid-3": 0.0}
