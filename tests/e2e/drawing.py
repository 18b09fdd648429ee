"""Responses of engines, by the pool alone: nothing is scored."""

from collections.abc import Sequence
from typing import Any

from astar_megatron.config import SamplingConfig
from astar_megatron.rollout.engine import Response
from astar_megatron.rollout.pool import EnginePool
from astar_megatron.types import Prompt, Request


def drawn(
    engines: EnginePool, prompt: Prompt, sampling: SamplingConfig, *, seeds: Sequence[int] = (1,), greedy: bool = False
) -> list[Response]:
    """Return a response to the prompt for each seed. Raises ConnectionError where the engine ends before."""
    requests = [Request(prompt=prompt, sample=sample, seed=seed, greedy=greedy) for sample, seed in enumerate(seeds)]
    stream = engines.generate(0, list(enumerate(requests)), sampling)
    by_tag = answers(engines, stream, len(requests))
    return [by_tag[tag] for tag in range(len(requests))]


def answers(engines: EnginePool, stream: Any, count: int) -> dict[int, Response]:
    """Return what an engine answers to `count` requests, by tag. Raises ConnectionError where it ends before."""
    by_tag: dict[int, Response] = {}
    while len(by_tag) < count:
        for _, responses in engines.responses([stream], seconds=600):
            if responses is None:
                raise ConnectionError("the engine has ended")
            by_tag.update({response.tag: response for response in responses})
    return by_tag
