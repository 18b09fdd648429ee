"""Four processes that stay for the session: starting Megatron costs more than a tiny layout's work."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from ranks import serve

NUM_RANKS = 4


class Ranks:
    """Runs a function of ranks.py on the first `world` processes at once and returns their results by rank."""

    def __init__(self, pipes: list[Any]) -> None:
        self._pipes = pipes

    def run(self, function: Callable[..., Any], world: int, **arguments: Any) -> list[Any]:
        first, *others = self._pipes[:world]
        first.send((function.__name__, 0, None, arguments))
        port = _answer(first)
        for rank, pipe in enumerate(others, start=1):
            pipe.send((function.__name__, rank, port, arguments))
        return [_answer(pipe) for pipe in (first, *others)]


def _answer(pipe: Any) -> Any:
    answer = pipe.recv()
    if isinstance(answer, str) and answer.startswith("Traceback"):
        raise AssertionError(answer)
    return answer


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    environment = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "GLOO_SOCKET_IFNAME": "lo"}
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for _ in range(NUM_RANKS):
        here, there = context.Pipe()
        process = context.Process(target=serve, args=(there,), daemon=False)
        process.start()
        there.close()
        pipes.append(here)
        processes.append(process)
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})
    yield Ranks(pipes)
    for pipe in pipes:
        pipe.send(None)
    for process in processes:
        process.join(timeout=30)
        if process.is_alive():
            process.kill()
