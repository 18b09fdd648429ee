"""What Ray adds to the driver's work: seconds a call on an actor, and bytes of what goes along; prints JSON.

    python tests/benchmarks/scale_calls.py

Two actors of a Ray session on this machine are called many times before they are waited for, as so many actors would
be called once: what the driver does for a call is the same. Seconds are the processor's, of this process alone, the
least of three rounds. Bytes are those of the values as Ray writes them.
"""

import json
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ray import cloudpickle
from scale_driver import PROMPT_TOKENS, RESPONSE_TOKENS, cpu_seconds, prompts

from astar_megatron.cluster.cluster import Cluster
from astar_megatron.config import ClusterConfig
from astar_megatron.rollout.engine import Response
from astar_megatron.types import Request, RolloutBatch

SIZES, ROUNDS = (64, 256, 1024, 4096, 8192), 3


class Plain:
    """Answers at once."""

    def call(self, *arguments: Any) -> None: ...


def batch(sequences: int) -> RolloutBatch:
    """Return a batch as A*PO sends it."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1000, 150_000, (sequences, PROMPT_TOKENS + RESPONSE_TOKENS), generator=generator)
    names = ("reward", "value", "rollout_logprob")
    return RolloutBatch(
        token_ids=tuple(map(tuple, tokens.tolist())),
        prompt_tokens=(PROMPT_TOKENS,) * sequences,
        columns={name: torch.zeros(sequences, dtype=torch.float64) for name in names},
        version=0,
    )


def num_bytes() -> dict[str, int]:
    """Return bytes of what crosses, a sequence or a digest."""
    generator = torch.Generator().manual_seed(0)
    token_ids = tuple(torch.randint(1000, 150_000, (RESPONSE_TOKENS,), generator=generator).tolist())
    logprobs = tuple((-torch.rand(RESPONSE_TOKENS, generator=generator)).tolist())
    response = Response(
        tag=1,
        token_ids=token_ids,
        truncated=False,
        token_logprobs=logprobs,
        first_version=0,
        last_version=0,
        tokens_by_version=(RESPONSE_TOKENS,),
    )
    request = (1, Request(prompt=prompts(1)[0], sample=0, seed=2**62))
    digests = [2**60 + number for number in range(1000)]

    def size(value: Any) -> int:
        return len(cloudpickle.dumps(value, protocol=5))  # pyright: ignore[reportPrivateImportUsage]

    return {
        "batch_a_sequence": size(batch(1024)) // 1024,
        "request": size([request] * 1),
        "response": size([response]),
        "digest": size(digests) // 1000,
    }


def calls(cluster: Cluster, actors: list[Any], number: int) -> float:
    """Return the seconds of so many calls and the wait for them."""

    def make() -> None:
        cluster.wait("calls", [actors[index % len(actors)].call.remote("publish", 1) for index in range(number)])

    return min(cpu_seconds(make) for _ in range(ROUNDS))


def num_files(cluster: Cluster) -> int:
    """Return how many files Ray's session has on this node."""
    return sum(path.is_file() for path in cluster._folder.path.rglob("*"))


def main() -> None:
    env = {"PYTHONPATH": os.pathsep.join(str(Path(__file__).resolve().parents[level]) for level in (0, 2))}
    report: dict[str, Any] = {"bytes": num_bytes()}
    with Cluster(ClusterConfig()) as cluster:
        before = num_files(cluster)
        actors = [cluster.actor("plain", index, Plain, env=env) for index in range(2)]
        cluster.wait("start", [actor.call.remote() for actor in actors], 120)
        report["seconds"] = {number: round(calls(cluster, actors, number), 4) for number in SIZES}
        report["files"] = {"session": before, "actor": (num_files(cluster) - before) / len(actors)}
        whole = batch(1024)
        put: Callable[[], Any] = lambda: cluster.wait("batch", [actors[0].call.remote("step", whole)])  # noqa: E731
        report["batch_seconds_a_sequence"] = min(cpu_seconds(put) for _ in range(ROUNDS)) / 1024
    report["peak_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    report["at"] = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    print(json.dumps(report))


if __name__ == "__main__":
    main()
