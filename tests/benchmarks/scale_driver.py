"""What the driver computes in a step, and once a run, beside so many simulated ranks and engines; prints JSON.

    python tests/benchmarks/scale_driver.py RANKS

The code is the real one: rollout source and feed, scoring, batch, metrics and files, placement, plan, publish with its
proof. Simulated are the far ends: an engine answers at once, a rank has digests and statistics and computes nothing.
scale_calls.py measures what Ray adds. There is an engine a 8.192 ranks, and a sequence a rank: a prompt of 128 tokens
and a response of 256. Seconds are the processor's, of all threads of this process; of a step the least of seven, after
a first.
"""

import dataclasses
import io
import json
import random
import resource
import sys
import tempfile
import time
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import samples
from fake_engines import FakeEngines
from scale_models import SIZES, model_named

from astar_megatron.algorithm import methods
from astar_megatron.algorithm.methods import Stage1
from astar_megatron.cluster.placement import Node, Placement, place
from astar_megatron.cluster.policy_group import PolicyGroup
from astar_megatron.config import ParallelConfig, RewardConfig, RolloutConfig, SamplingConfig
from astar_megatron.data.prompts import PromptStream
from astar_megatron.model.options import PolicyOptions
from astar_megatron.rollout.engine import EngineOptions
from astar_megatron.rollout.pool import EnginePool
from astar_megatron.rollout.source import RolloutSource
from astar_megatron.rollout.training import TrainingRollouts
from astar_megatron.run.garbage import collect_seldom
from astar_megatron.run.record import record_of
from astar_megatron.run.steps import batch_of, health_of
from astar_megatron.run.tracking import Tracker
from astar_megatron.run.weights import WeightSync
from astar_megatron.types import Prompt, Rollout, RolloutBatch
from conversion.transfer.route import Place
from conversion.verify import Part

PROMPT_TOKENS, RESPONSE_TOKENS = 128, 256
STEPS = 8
STREAMS_AT_ONCE = 20  # what comes in the 0.05 s that the pool waits: 8,192 responses in 20 s
MODEL, SPREAD = model_named("7B"), SIZES["7B"]


def num_engines(ranks: int) -> int:
    """Return how many engines there are beside so many ranks: 1,000 beside 8,192."""
    return max(1, round(ranks * 1000 / 8192))


type Measure = Callable[[Callable[[], Any]], float]  # of the work that a call makes


def cpu_seconds(call: Callable[[], Any]) -> float:
    """Return the processor's seconds of a call, of all threads of this process."""
    start = time.process_time()
    call()
    return time.process_time() - start


def prompts(number: int) -> list[Prompt]:
    token_ids = tuple(range(1000, 1000 + PROMPT_TOKENS))
    return [Prompt(uid=f"{i:032x}", token_ids=token_ids, text="What is 2 + 2?", answer="4") for i in range(number)]


def drawing(ranks: int, folder: Path, measure: Measure) -> tuple[float, list[Rollout]]:
    """Return seconds of asking for the rollouts of a step, taking and scoring them; and those of the last step."""
    token_ids, seconds, drawn = tuple(range(2000, 2000 + RESPONSE_TOKENS)), [], []
    engines = FakeEngines(
        lambda request: (token_ids, False),
        lambda ids: "two and two is 4",
        num_engines=num_engines(ranks),
        max_num_seqs=256,
        at_once=4,
        streams_at_once=STREAMS_AT_ONCE,
    )
    with RolloutSource(engines, SamplingConfig(), RewardConfig(name="last_number"), folder) as source:
        stream = PromptStream(prompts(2 * ranks), ranks, 0)
        batches = TrainingRollouts(source, stream, RolloutConfig(), 0, versions=range(STEPS))
        for version in range(STEPS):
            engines.version = version
            seconds.append(measure(lambda of=version: drawn.extend(batches.take(of, lambda name: nullcontext()))))
    return min(seconds[1:]), drawn[-ranks:]


def recording(ranks: int, folder: Path, drawn: list[Rollout], measure: Measure) -> dict[str, float]:
    """Return seconds of making the batch of a step, and of its statistics, metrics and files."""
    chance = random.Random(0)
    logprobs = [tuple(chance.uniform(-2.0, 0.0) for _ in range(RESPONSE_TOKENS)) for _ in range(16)]  # as they pack
    drawn = [dataclasses.replace(rollout, token_logprobs=chance.choice(logprobs)) for rollout in drawn]
    cfg, uids = samples.run_config(run_dir=str(folder)), [rollout.prompt.uid for rollout in drawn]
    v_star = dict.fromkeys(uids, 0.5)
    objective = methods.objective_of(cfg, Stage1(v_star=v_star, v_star_at_beta2=v_star, samples=dict.fromkeys(uids, 8)))
    rows = tuple(-0.25 * RESPONSE_TOKENS - index / ranks for index in range(ranks))
    of_sequences: dict[str, Any] = {"logprobs": rows, "reference_logprobs": rows, "losses": rows, "skipped": ()}
    tokens = array("f", [-0.25]) * sum(len(rollout.token_ids) for rollout in drawn)
    stats = dataclasses.replace(
        samples.STATS,
        peak_memory_bytes=(80 << 30,) * ranks,
        token_logprobs=tokens,
        reference_token_logprobs=tokens,
        **of_sequences,
    )
    spans: dict[str, float] = {"generate": 1.0, "publish": 1.0, "total": 2.0}
    version = drawn[0].first_version
    seconds, batches = defaultdict[str, list[float]](list), list[RolloutBatch]()

    def write(batch: RolloutBatch) -> None:
        health = health_of(objective, drawn, batch, stats, ranks)
        objective.learn(drawn, health)
        record.add(drawn, batch, stats, health, dict(spans), {})

    with redirect_stdout(io.StringIO()), record_of(cfg, MODEL, Tracker(folder), 0, None, str) as record:
        for _ in range(STEPS):
            seconds["batch"].append(measure(lambda: batches.append(batch_of(drawn, objective, version))))
            seconds["record"].append(measure(lambda: write(batches.pop())))
    return {name: min(of_steps[1:]) for name, of_steps in seconds.items()}


class Actor:
    """A rank or an engine that is not there: a call on it is its name, to be answered by the cluster."""

    def __init__(self, kind: str, index: int) -> None:
        self.kind, self.index = kind, index
        self.method = ""

    def __getattr__(self, method: str) -> "Actor":
        call = Actor(self.kind, self.index)
        call.method = method
        return call

    def options(self, **_: object) -> "Actor":
        return self

    def remote(self, *arguments: Any) -> "Actor":
        if self.method == "call":  # a rank is told the method
            self.method = arguments[0]
        return self


class Cluster:
    """See cluster.Cluster: as far as a policy and a pool need one to be given weights. `digests` are by rank."""

    num_gpus, num_nodes, socket_folder, timeout_seconds = 0, 1, None, 60.0

    def __init__(self, placement: Placement) -> None:
        self.reservation = SimpleNamespace(placement=placement)
        self.digests: dict[int, list[int]] = {}
        self.audits: list[Any] = []
        self.asked: Counter[str] = Counter()  # by method

    def threads(self, seats: object, workers: int = 1) -> int:
        return 1

    def actor(self, kind: str, index: int, cls: type, **_: object) -> Actor:
        return Actor(kind, index)

    def wait(self, action: str, calls: Sequence[Actor], timeout_seconds: float | None = None) -> list[Any]:
        return [self._answer(call) for call in calls]

    def _answer(self, call: Actor) -> Any:
        self.asked[call.method] += 1
        match call.method:
            case "place":
                return Place(memory=f"rank {call.index}", device=f"rank {call.index}")
            case "places":
                return [(f"engine {call.index}", f"{call.index}.{worker}") for worker in range(SPREAD.workers)]
            case "digests":
                return self.digests.get(call.index, [])
            case "audit":
                return self.audits[call.index]
        return None


def placing(ranks: int, measure: Measure) -> tuple[dict[str, float], Cluster]:
    """Return seconds of finding all processes their GPUs and of writing down where they are; and the cluster."""
    rollout = RolloutConfig(num_engines=num_engines(ranks), tensor=SPREAD.workers)
    gpus = ranks + rollout.num_engines * rollout.tensor
    nodes = [Node(address=f"10.{i >> 8}.{i & 255}.1", num_gpus=8, id=f"{i:056x}") for i in range(-(-gpus // 8))]
    placed: list[Placement] = []
    seconds = measure(lambda: placed.append(place(nodes, parallel_of(ranks), rollout, None)))

    def describe() -> None:
        for words in (placed[0].fields, placed[0].describe, placed[0].rows):
            words()

    return {"place": seconds, "describe": measure(describe)}, Cluster(placed[0])


def parallel_of(ranks: int) -> ParallelConfig:
    layout = SPREAD.layout(ranks)
    return ParallelConfig(tensor=layout.tensor, pipeline=layout.pipeline, data=layout.data)


def publishing(ranks: int, cluster: Any, measure: Measure) -> dict[str, float]:
    """Return seconds of making policy and pool and of planning, once; and of a publish with its proof."""
    cfg = samples.run_config()
    rollout = RolloutConfig(num_engines=num_engines(ranks), tensor=SPREAD.workers)
    both: dict[str, Any] = {"model_path": "m", "dtype": "bfloat16", "seed": 0}
    made: list[Any] = []

    def make() -> None:
        parallel = parallel_of(ranks)
        made.append(PolicyGroup(cluster, PolicyOptions(parallel=parallel, optim=cfg.optim, optimizer_steps=1, **both)))
        options = EngineOptions(rollout=rollout, max_tokens=1024, stop_token_ids=(), on_gpu=False, **both)
        made.append(EnginePool(cluster, options, detokenize=str))

    seconds = {"actors": measure(make)}
    policy, pool = made
    policy.rendezvous = ("127.0.0.1", 1)
    for member in pool._members:
        member.runs = True
    seconds["open"] = measure(lambda: made.append(WeightSync(policy, pool, MODEL, Path(), cfg.conversion)))
    weights: WeightSync = made[2]
    copies = weights._plan.copies
    digests = {key: 10**18 + index for index, key in enumerate({(copy.hf, copy.rectangle): 0 for copy in copies})}
    sent: dict[int, dict[Part, int]] = defaultdict(dict)
    for copy in copies:
        sent[copy.source.rank][Part(copy.source, copy.hf, copy.rectangle)] = digests[copy.hf, copy.rectangle]
    cluster.digests = {rank: list(parts.values()) for rank, parts in sent.items()}
    parts = [weights._verifier.target_parts[worker] for worker in range(SPREAD.workers)]
    holdings = [
        {"digests": [digests[part.hf, part.rectangle] for part in of_worker], "faults": []} for of_worker in parts
    ]
    text = json.dumps(holdings)  # read anew for each: in a run every answer has numbers of its own
    cluster.audits = [json.loads(text) for _ in pool._members]
    of_steps = [measure(partial(weights.publish, version)) for version in range(STEPS)]
    return seconds | {"publish": min(of_steps[1:])}


def measured(ranks: int, measure: Measure) -> tuple[dict[str, float], dict[str, float]]:
    """Return the work of a step and that of once a run, by its part."""
    with tempfile.TemporaryDirectory() as folder:
        of_drawing, drawn = drawing(ranks, Path(folder), measure)
        a_step = {"rollouts": of_drawing} | recording(ranks, Path(folder), drawn, measure)
    once, cluster = placing(ranks, measure)
    once |= publishing(ranks, cluster, measure)
    a_step["publish"] = once.pop("publish")
    return a_step, once


def main() -> None:
    ranks, start = int(sys.argv[1]), time.monotonic()
    collect_seldom()  # as `astar train`
    a_step, once = measured(ranks, cpu_seconds)
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
