"""What the driver computes in a step, and once a run, beside so many simulated ranks and engines; prints JSON.

    python tests/benchmarks/scale_driver.py RANKS

The code is the real one: rollout source and feed, scoring, batch, metrics and files, placement, plan, publish with its
proof. Simulated are the far ends: an engine answers at once, a rank has digests and statistics and computes nothing.
scale_calls.py measures what Ray adds. There is an engine a 8.192 ranks, and a sequence a rank: a prompt of 128 tokens
and a response of 256. Seconds are the processor's, of all threads of this process; of a step the least of three, after
a first.
"""

import dataclasses
import io
import json
import resource
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import samples
from fake_engines import FakeEngines
from scale_models import SIZES, model_named

from astar_megatron.algorithm import methods
from astar_megatron.algorithm.methods import Stage1
from astar_megatron.cluster.placement import Node, Placement, place
from astar_megatron.config import ConversionConfig, ParallelConfig, RewardConfig, RolloutConfig, SamplingConfig
from astar_megatron.data.prompts import PromptStream
from astar_megatron.rollout.source import RolloutSource
from astar_megatron.rollout.training import TrainingRollouts
from astar_megatron.run.record import record_of
from astar_megatron.run.steps import batch_of, health_of
from astar_megatron.run.tracking import Tracker
from astar_megatron.run.weights import WeightSync
from astar_megatron.types import Prompt, Rollout, RolloutBatch
from conversion.plan import plan
from conversion.transfer.route import Place
from conversion.verify import Part

PROMPT_TOKENS, RESPONSE_TOKENS = 128, 256
STEPS = 4
MODEL, SPREAD = model_named("7B"), SIZES["7B"]


def num_engines(ranks: int) -> int:
    """Return how many engines there are beside so many ranks: 1,000 beside 8,192."""
    return max(1, round(ranks * 1000 / 8192))


def cpu_seconds(call: Callable[[], Any]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def prompts(number: int) -> list[Prompt]:
    token_ids = tuple(range(1000, 1000 + PROMPT_TOKENS))
    return [Prompt(uid=f"{i:032x}", token_ids=token_ids, text="What is 2 + 2?", answer="4") for i in range(number)]


def drawing(ranks: int, folder: Path) -> tuple[float, list[Rollout]]:
    """Return seconds of asking for the rollouts of a step, taking and scoring them; and those of the last step."""
    token_ids, seconds, drawn = tuple(range(2000, 2000 + RESPONSE_TOKENS)), [], []
    engines = FakeEngines(
        lambda request: (token_ids, False),
        lambda ids: "two and two is 4",
        num_engines=num_engines(ranks),
        max_num_seqs=256,
        at_once=4,
    )
    with RolloutSource(engines, SamplingConfig(), RewardConfig(name="last_number"), folder) as source:
        stream = PromptStream(prompts(2 * ranks), ranks, 0)
        batches = TrainingRollouts(source, stream, RolloutConfig(), 0, versions=range(STEPS))
        for version in range(STEPS):
            engines.version = version
            seconds.append(cpu_seconds(lambda: drawn.extend(batches.take(version, lambda name: nullcontext()))))
    return min(seconds[1:]), drawn[-ranks:]


def recording(ranks: int, folder: Path, drawn: list[Rollout]) -> dict[str, float]:
    """Return seconds of making the batch of a step, and of its statistics, metrics and files."""
    cfg, uids = samples.run_config(run_dir=str(folder)), [rollout.prompt.uid for rollout in drawn]
    v_star = dict.fromkeys(uids, 0.5)
    objective = methods.objective_of(cfg, Stage1(v_star=v_star, v_star_at_beta2=v_star, samples=dict.fromkeys(uids, 8)))
    record = record_of(cfg, MODEL, Tracker(folder), 0, 0)
    rows = tuple(-0.25 * RESPONSE_TOKENS - index / ranks for index in range(ranks))
    of_sequences: dict[str, Any] = {"logprobs": rows, "reference_logprobs": rows, "losses": rows, "skipped": ()}
    stats = dataclasses.replace(samples.STATS, peak_memory_bytes=(80 << 30,) * ranks, **of_sequences)
    spans, version = dict.fromkeys(("generate", "publish", "total"), 1.0), drawn[0].first_version
    seconds = defaultdict[str, list[float]](list)

    def write(batch: RolloutBatch) -> None:
        health = health_of(objective, drawn, stats, version, ranks)
        objective.learn(drawn, health)
        record.add(drawn, batch, stats, health, dict(spans), {})

    with redirect_stdout(io.StringIO()):
        for _ in range(STEPS):
            batch: list[RolloutBatch] = []
            seconds["batch"].append(cpu_seconds(lambda: batch.append(batch_of(drawn, objective, version))))
            seconds["record"].append(cpu_seconds(lambda: write(batch[0])))
    return {name: min(of_steps[1:]) for name, of_steps in seconds.items()}


class Policy:
    """So many ranks, behind the face of a PolicyGroup. `sent` are the digests of each."""

    dtype, rendezvous = "bfloat16", ("127.0.0.1", 1)

    def __init__(self, ranks: int) -> None:
        self.layout, self.sent = SPREAD.layout(ranks), [[] for _ in range(ranks)]

    def places(self) -> list[Place]:
        return [Place(memory=f"node {rank // 8}", device=f"rank {rank}") for rank in range(self.layout.world_size)]

    def open_publish(self, route: object) -> None: ...

    def begin_publish(self, version: int, *senders: object) -> list[Any]:
        return []

    def digests(self, *senders: object) -> list[list[int]]:
        return self.sent

    def digest_rows(self, rank: int, index: int) -> list[int]:
        raise AssertionError("asked where a digest is wrong")


class Pool:
    """So many engines, behind the face of an EnginePool. `answer` is what each worker of an engine holds."""

    tensor = SPREAD.workers

    def __init__(self, number: int) -> None:
        self.members = [SimpleMember(index) for index in range(number)]
        self.answers: list[Any] = []

    def running(self) -> list[Any]:
        return list(self.members)

    def places(self, members: Sequence[Any]) -> list[list[Place]]:
        workers = range(self.tensor)
        return [[Place(memory=f"engine {m.index}", device=f"{m.index}.{w}") for w in workers] for m in members]

    def open_update(self, info: object, members: object) -> bool:
        return True

    def update(self, version: int, members: Sequence[Any], sending: object) -> list[Any]:
        return list(members)

    def audit(self, version: int, members: Sequence[Any]) -> dict[Any, list[dict[str, Any]]]:
        return dict(zip(members, self.answers, strict=True))

    def serve(self, members: object) -> None: ...


class SimpleMember:
    def __init__(self, index: int) -> None:
        self.index = index


def publishing(ranks: int) -> dict[str, float]:
    """Return seconds of planning, once, and of a publish and its proof."""
    policy, pool, made = Policy(ranks), Pool(num_engines(ranks)), []
    folder, cfg = Path(), ConversionConfig()
    open_seconds = cpu_seconds(lambda: made.append(WeightSync(policy, pool, MODEL, folder, cfg)))  # type: ignore[arg-type]
    weights: WeightSync = made[0]
    copies = plan(MODEL.megatron_tiles(SPREAD.layout(min(64, ranks))), MODEL.vllm_tiles(SPREAD.workers)).copies
    numbers = {key: 10**18 + index for index, key in enumerate({(copy.hf, copy.rectangle): None for copy in copies})}
    sent: dict[int, dict[Part, int]] = defaultdict(dict)
    for copy in weights._plan.copies:
        sent[copy.source.rank][Part(copy.source, copy.hf, copy.rectangle)] = numbers[copy.hf, copy.rectangle]
    for rank, parts in sent.items():
        policy.sent[rank] = list(parts.values())
    workers = [
        {"digests": [numbers[part.hf, part.rectangle] for part in weights._verifier.target_parts[worker]], "faults": []}
        for worker in range(pool.tensor)
    ]
    text = json.dumps(workers)  # read anew: in a run each answer has numbers of its own
    pool.answers = [json.loads(text) for _ in pool.members]
    seconds = [cpu_seconds(lambda: weights.publish(version)) for version in range(STEPS)]
    return {"open": open_seconds, "publish": min(seconds[1:])}


def placing(ranks: int) -> dict[str, float]:
    """Return seconds of finding all processes their GPUs, and of what is asked of the placement at the start."""
    rollout = RolloutConfig(num_engines=num_engines(ranks), tensor=SPREAD.workers)
    layout = SPREAD.layout(ranks)
    parallel = ParallelConfig(tensor=layout.tensor, pipeline=layout.pipeline, data=layout.data)
    gpus = ranks + rollout.num_engines * rollout.tensor
    nodes = [Node(address=f"10.{i >> 8}.{i & 255}.1", num_gpus=8, id=f"{i:056x}") for i in range(-(-gpus // 8))]
    made: list[Placement] = []
    seconds = {"place": cpu_seconds(lambda: made.append(place(nodes, parallel, rollout, None)))}

    def start() -> None:
        placement = made[0]
        json.dumps(placement.fields())
        placement.describe()
        placement.rows()
        [placement.is_shared(seat) for seat in placement.ranks]

    return seconds | {"seats": cpu_seconds(start)}


def main() -> None:
    ranks = int(sys.argv[1])
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        draw_seconds, drawn = drawing(ranks, Path(folder))
        a_step = {"rollouts": draw_seconds} | recording(ranks, Path(folder), drawn)
        once = publishing(ranks) | placing(ranks)
    a_step["publish"] = once.pop("publish")
    report = {
        "ranks": ranks,
        "engines": num_engines(ranks),
        "step": {name: round(seconds, 4) for name, seconds in a_step.items()},
        "once": {name: round(seconds, 3) for name, seconds in once.items()},
        "wall_seconds": round(time.monotonic() - start, 1),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
