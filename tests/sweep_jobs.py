"""A sweep with an engine made by hand, and a server that forks processes which run it: what tests/test_sweep.py kills.

`python sweep_jobs.py` reads a line of JSON a command from stdin, and answers each with a line: the arguments of `run`
start a job and give its pid; a number, a pid, gives that job's exit status once it has ended.
"""

import json
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import samples
from fake_engines import Answer, FakeEngines
from samples import CONTRACT

from astar_megatron.run.prepare import Inputs
from astar_megatron.run.tracking import Tracker
from astar_megatron.sweep import sweep
from astar_megatron.types import Prompt, Request, Rollout
from conversion.families import Model

PROMPTS = [Prompt(uid=f"{i:032x}", token_ids=(1, i), text=f"prompt {i}", answer=str(i % 3)) for i in range(300)]


def answer(prompt: Prompt, sample: int, seed: int) -> Rollout:
    """What the engine and its detokeniser make of a request: it depends on the seed alone."""
    drawn = random.Random(seed)
    token_ids = tuple(drawn.randrange(100) for _ in range(drawn.randrange(1, 8)))
    return samples.rollout(
        prompt,
        sample=sample,
        seed=seed,
        token_ids=token_ids,
        text=text(token_ids),
        truncated=drawn.random() < 0.1,
        token_logprobs=(-0.5,) * len(token_ids),
        reward=None,
    )


def text(token_ids: Sequence[int]) -> str:
    return str(sum(token_ids) % 4)


def _answer(request: Request) -> Answer:
    rollout = answer(request.prompt, request.sample, request.seed)
    return rollout.token_ids, rollout.truncated


def run(folder: str, seconds: float, num_prompts: int = 300, reward: str = "last_number", **settings: Any) -> Inputs:
    """Sweep `num_prompts` prompts into `folder`/v_star and return them; `seconds` is the pace, of 13 rows."""
    sections = {"reward": {"name": reward}, "sweep": {"num_samples": 4} | settings, "rollout": {"max_num_seqs": 16}}
    cfg = samples.run_config(run_dir=folder, **sections)
    inputs = Inputs(
        prompts=PROMPTS[:num_prompts],
        eval_sets=[],
        contract=CONTRACT,
        model=cast(Model, None),  # the fake has no use for it
    )
    sweep(cfg, inputs, FakeEngines(_answer, text, seconds=seconds), Tracker(folder))
    return inputs


def rows(folder: Path) -> list[dict[str, Any]]:
    """Every row on disk, sorted; those written twice come twice."""
    import pyarrow.parquet as pq

    unsorted = [row for path in (folder / "v_star").glob("shard-*.parquet") for row in pq.read_table(path).to_pylist()]
    return sorted(unsorted, key=lambda row: (row["uid"], row["sample"]))


def expected(num_prompts: int = 300, num_samples: int = 4) -> set[tuple[str, int]]:
    return {(prompt.uid, sample) for prompt in PROMPTS[:num_prompts] for sample in range(num_samples)}


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a sweep says is not an answer
    for line in sys.stdin:
        command = json.loads(line)
        if isinstance(command, int):
            pid, status = os.waitpid(command, os.WNOHANG)
            print(os.waitstatus_to_exitcode(status) if pid else "running", file=answers, flush=True)
        elif pid := os.fork():
            print(pid, file=answers, flush=True)
        else:
            run(**command)
            os._exit(0)


if __name__ == "__main__":
    serve()
