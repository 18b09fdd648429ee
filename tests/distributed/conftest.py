"""Rank processes, new for every layout: gloo threads of a group that has ended spin on in a process that lives."""

import multiprocessing
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any

import pytest
from ranks import serve

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "GLOO_SOCKET_IFNAME": "lo"}
ANSWER_SECONDS = 240


class Ranks:
    """Runs a function of a file beside this on `world` new processes at once and returns their results by rank.

    The fork server imports Megatron once; its children start with that done.
    """

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        # Of Megatron and safetensors also what is imported in a rank's first step.
        later = ["megatron.core.models.mimo", "safetensors.torch"]
        self._context.set_forkserver_preload(["ranks", "astar_megatron.model.policy", *later])
        with pytest.MonkeyPatch.context() as patch:  # not for good: two nodes of another test do not meet on loopback
            for name, value in ENVIRONMENT.items():
                patch.setenv(name, value)
            forkserver.ensure_running()

    def run(self, function: Callable[..., Any], world: int, **arguments: Any) -> list[Any]:
        pipes, processes = [], []
        for rank in range(world):
            here, there = self._context.Pipe()
            process = self._context.Process(target=serve, args=(there, function, rank, arguments))
            process.start()
            there.close()
            pipes.append(here)
            processes.append(process)
        try:
            port = _answer(pipes[0])
            for pipe in pipes[1:]:
                pipe.send(port)
            return [_answer(pipe) for pipe in pipes]
        finally:
            for process in processes:
                process.join(timeout=10)
                process.kill()


def _answer(pipe: Connection) -> Any:
    assert pipe.poll(ANSWER_SECONDS), f"no answer from a rank in {ANSWER_SECONDS} s"
    answer = pipe.recv()
    if isinstance(answer, str) and answer.startswith("Traceback"):
        raise AssertionError(answer)
    return answer


@pytest.fixture(scope="session")
def ranks() -> Ranks:
    return Ranks()
