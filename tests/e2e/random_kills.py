"""Runs of which processes are killed at random moments until they end, against the run that nothing ended.

Policy and engines apart and by turns, on one node and on two (see two_nodes.py). A moment is drawn by steps: a start
takes longer than all steps of such a run, and by seconds alone most kills would hit it. A driver that has ended is
started again with the same command, a node whose raylet was killed joins again. When a run has ended and kills are
left, another one begins. What comes out must be the very numbers of the run that nothing ended: metrics, rollouts with
their prompts and seeds, evaluations, final weights.
"""

import hashlib
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from subprocess import DEVNULL, Popen
from typing import Any, Protocol

import pyarrow.parquet as pq
import samples
import yaml
from driver_process import driver, name_of
from two_nodes import Nodes, two_nodes

from astar_megatron.cluster.endings import ended_by_ray
from astar_megatron.cluster.signals import LOST
from astar_megatron.run.tracking import METRICS_FILE, read_metrics

# Name: whether on two nodes, whether policy and engines take turns.
LAYOUTS = {
    "apart": (False, False),
    "by turns": (False, True),
    "two nodes": (True, False),
    "two nodes, by turns": (True, True),
}
# What is killed beside the driver, by the first word of its command line.
VICTIMS: dict[str, Callable[[str], bool]] = {
    "engine": lambda title: title.startswith("ray::Engine"),
    "engine's core": lambda title: title == "VLLM::EngineCore",
    "rank": lambda title: title.startswith("ray::_RankActor"),
    "raylet": lambda title: title.endswith("/raylet/raylet"),
}
_SECONDS = 900.0  # for a run or what is left of it
_MOST_STARTS = 12  # of one run: each ends with a kill of its own
_MOST_RUNS = 6  # of a layout: some end before the next kill's moment
_LOST_A_RANK = "training goes on from the newest checkpoint"  # what a run says then, and has said after the new start:
_HAS_STARTED_AGAIN = r"starting the policy again: \d+\.\d s"  # whole seconds are said while it lasts


def write_run(folder: Path, model: Path, name: str, /, **sections: dict[str, Any]) -> Path:
    """Write the configuration of a small run, with keys of `sections`, and return its file; the run is beside it."""
    rows = [{"question": f"What is {a} + {b}?", "answer": str(a + b)} for a in range(4) for b in range(3)]
    tree = samples.run_tree(
        run_dir=str(folder / name),
        model={"path": str(model), "dtype": "float32"},
        data={"path": str(samples.write_jsonl(folder / "prompts.jsonl", rows)), "max_prompt_tokens": 100},
        reward={"name": "length_reward:reward"},
        objective={"name": "rebel"},
        sampling={"max_response_tokens": 45},
        train={"num_steps": 8, "batch_size": 12, "mini_batch_size": 6, "micro_batch_tokens": 130},
        optim={"lr": 1e-3},
        rollout={"max_num_seqs": 3, "num_engines": 2, "heartbeat_seconds": 120.0, "keep": None},
        conversion={"bucket_bytes": 4096},
        checkpoint={"interval": 2},
        eval={"interval": 3, "max_prompts": 5},
        cluster={"threads": 1, "start_timeout_seconds": _SECONDS},
    )
    tree |= {key: tree.get(key, {}) | section for key, section in sections.items()}
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def numbers_of(run: Path) -> dict[str, Any]:
    """What a run has computed; of what has no measured part, a digest."""
    rollouts = {
        path.name: pq.read_table(path, columns=["uid", "sample", "seed", "token_ids", "reward"]).to_pylist()
        for path in sorted((run / "rollouts").glob("step_*.parquet"))
    }
    return {
        "metrics": [line | samples.MEASURED_AFTER_DEATHS for line in read_metrics(run)],
        "rollouts": rollouts,
        "evaluations": {path.name: _digest(path) for path in sorted(run.glob("eval*.jsonl"))},
        "weights": _digest(run / "hf" / "model.safetensors"),
    }


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Attempt(Protocol):
    """A started `astar train`, until it has ended."""

    process: Popen[str]

    def driver(self) -> int:
        """The driver's process number."""
        ...

    def look(self) -> set[int]:
        """The processes of the run now."""
        ...

    def output(self) -> str:
        """What it has said."""
        ...

    def wait(self) -> int:
        """Its exit status, when it and what it had started have ended."""
        ...


class AttemptOnNodes:
    """One whose Ray was there before, on two nodes."""

    def __init__(self, nodes: Nodes, file: Path) -> None:
        self._nodes, self._output = nodes, file.with_suffix(".txt")
        command = [sys.executable, "-m", "astar_megatron.cli", "train", "--config", str(file)]
        with self._output.open("w") as output:
            self.process = nodes.begin(0, command, cwd=file.parent, stdout=output, stdin=DEVNULL)

    def driver(self) -> int:
        return int(Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text())

    def look(self) -> set[int]:
        return self._nodes.processes(0) | self._nodes.processes(1)

    def output(self) -> str:
        return self._output.read_text()

    def wait(self) -> int:
        return self.process.wait()


@contextmanager
def attempt_at(file: Path, nodes: Nodes | None) -> Iterator[Attempt]:
    """`astar train --config file`, which is killed where it has not ended."""
    if nodes is None:
        with driver("train", "--config", str(file)) as process:
            yield process
        return
    attempt = AttemptOnNodes(nodes, file)
    try:
        yield attempt
    finally:
        if attempt.process.poll() is None:
            nodes.kill(attempt.process, signal.SIGKILL)
            attempt.process.wait()


def join_again(nodes: Nodes | None) -> None:
    """Start Ray again on nodes whose raylet was killed; without its head a cluster is another one."""
    ended = [node for node, ray in nodes.rays.items() if ray.poll() is not None] if nodes else []
    if nodes and ended:
        affected = (1, 0) if 0 in ended else (1,)
        for node in affected:
            nodes.stop_ray(node)
        for node in reversed(affected):
            nodes.start_ray(node)


def processes_of(victim: str, attempt: Attempt) -> list[int]:
    """The processes of a run that are called so."""
    if victim == "driver":
        return [attempt.driver()]
    titles = {pid: name_of(pid).split(" ")[0] for pid in sorted(attempt.look())}
    return [pid for pid, title in titles.items() if VICTIMS[victim](title)]


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds of the run that nothing ended: all, with its start; of a step, and of its parts as metrics name them."""

    whole: float
    step: float
    parts: dict[str, float]

    @classmethod
    def of(cls, run: Path, whole: float) -> "Pace":
        """Of a run that has ended after `whole` seconds."""
        lines = [line["seconds"] for line in read_metrics(run)]
        parts = {name: round(sum(line.get(name, 0.0) for line in lines) / len(lines), 3) for name in sorted(lines[0])}
        return cls(whole, parts["total"], parts)


def phase_of(run: Path, output: str, seconds: float) -> str:
    """What a run is doing that was started so many seconds ago, as far as it shows: older files are of a dead one.

    The parts of a step leave no trace while they last: `Kill.into_step` and `Pace.parts` say where in it a kill came.
    """
    _, has_lost_a_rank, since = output.rpartition(_LOST_A_RANK)
    if has_lost_a_rank and not re.search(_HAS_STARTED_AGAIN, since):
        return "policy's start"
    if "weights go to the engines" not in output:
        return "start"
    if _has_new(run, "checkpoints/*.incomplete", seconds):
        return "save"
    if _has_new(run, ".hf.new-*", seconds):
        return "export"
    return "evaluation" if output.splitlines()[-1].startswith("eval") else "step"


def _has_new(run: Path, pattern: str, seconds: float) -> bool:
    with suppress(FileNotFoundError):
        return any(time.time() - path.stat().st_mtime < seconds for path in run.glob(pattern))
    return False


@dataclass(frozen=True, slots=True)
class Kill:
    """What was killed, in which phase, after how many steps, and how many seconds after the run's last start.

    `into_step`: seconds since the last line of metrics, or since training began; None before.
    """

    victim: str
    phase: str
    steps: int
    seconds: float
    into_step: float | None


def run_to_its_end(
    file: Path, nodes: Nodes | None, victims: list[str], chance: random.Random, pace: Pace | None
) -> tuple[list[Kill], int]:
    """Run, and kill `victims` one after the other, each at a moment drawn from `pace`; those killed are removed.

    Returns the kills and how often the run was started.
    """
    run, kills = file.with_suffix(""), []
    for starts in range(1, _MOST_STARTS + 1):
        with attempt_at(file, nodes) as attempt:
            begun = time.monotonic()
            while victims and pace and not ends_before_a_moment(attempt, run, pace, chance):
                if not (pids := processes_of(victims[0], attempt)):
                    continue  # there is none yet, or one is being replaced
                seconds_in = _since(begun)
                phase = phase_of(run, attempt.output(), seconds_in)
                kill = Kill(victims[0], phase, len(read_metrics(run)), seconds_in, _into_step(run, seconds_in))
                with suppress(ProcessLookupError):
                    os.kill(chance.choice(pids), signal.SIGKILL)
                    kills.append(kill)
                    victims.pop(0)
                if kill.victim == "driver":
                    break
                if kill.victim == "raylet" and nodes:
                    while all(ray.poll() is None for ray in nodes.rays.values()):
                        time.sleep(0.1)
                    if nodes.rays[0].poll() is None:  # else the driver has to end first
                        join_again(nodes)
            status = attempt.wait()
            if status == 0:
                return kills, starts
            output = attempt.output()
            assert status in (LOST, -signal.SIGKILL) or ended_by_ray(status, output), (status, kills, output)
        join_again(nodes)
    raise AssertionError(f"{_MOST_STARTS} starts were not enough; killed: {kills}")


def _since(begun: float) -> float:
    return round(time.monotonic() - begun, 1)


def _into_step(run: Path, seconds: float) -> float | None:
    """Seconds since the last line of metrics of a run that was started so many seconds ago; None: it has none yet."""
    metrics = run / METRICS_FILE
    age = time.time() - metrics.stat().st_mtime if metrics.exists() else seconds
    return round(age, 1) if age < seconds else None


def ends_before_a_moment(attempt: Attempt, run: Path, pace: Pace, chance: random.Random) -> bool:
    """Wait for a moment drawn at random; return whether the run has ended by then.

    It lies within a third of a whole run, wherever that is, or when one or two more steps have been taken, about a step
    from then. Steps that a run takes again after a death count from where it takes them up.
    """
    if not (steps := chance.choice((0, 1, 2))):
        return _has_ended(attempt, chance.uniform(0.0, pace.whole / 3))
    fewest = len(read_metrics(run))
    while len(read_metrics(run)) < fewest + steps:
        if _has_ended(attempt, 0.2):
            return True
        fewest = min(fewest, len(read_metrics(run)))
    return _has_ended(attempt, chance.uniform(0.0, 1.5 * pace.step))


def _has_ended(attempt: Attempt, seconds: float) -> bool:
    """Wait so long; return whether the run has ended by then."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and attempt.process.poll() is None:
        attempt.look()
        time.sleep(min(0.2, seconds))
    return attempt.process.poll() is not None


def summary_of(layout: str, model: Path, folder: Path, num_kills: int, seed: int) -> dict[str, Any]:
    """Kill `num_kills` processes of runs with a layout and return what it came to; the numbers are compared."""
    has_two_nodes, take_turns = LAYOUTS[layout]
    chance = random.Random(f"{layout} {seed}")
    victims = [["driver", *VICTIMS][index % (1 + len(VICTIMS))] for index in range(num_kills)]
    chance.shuffle(victims)
    kills: list[Kill] = []
    starts, runs, differing, lost, twice = 0, 0, 0, 0, 0
    with ExitStack() as stack:
        nodes = stack.enter_context(two_nodes(Path(__file__).parent)) if has_two_nodes else None
        changes: dict[str, dict[str, Any]] = {"cluster": {"address": nodes.address}} if nodes else {}
        changes["eval"] = {"num_samples": 12}  # evaluations take as long as steps, so that some are hit
        if take_turns:
            cluster = changes.get("cluster", {}) | {"share_gpus": True}
            changes |= {"rollout": {"num_engines": 1}, "train": {"offload": "all"}, "cluster": cluster}
            changes["model"] = {"dtype": "bfloat16"}  # its master weights are given back too
        begun = time.monotonic()
        run_to_its_end(file := write_run(folder, model, "whole", **changes), nodes, [], chance, None)
        pace = Pace.of(file.with_suffix(""), _since(begun))
        whole = numbers_of(file.with_suffix(""))
        while victims:
            assert runs < _MOST_RUNS, f"{runs} runs ended before the moments of {victims}; killed: {kills}"
            file = write_run(folder, model, f"killed_{runs}", **changes)
            made, started = run_to_its_end(file, nodes, victims, chance, pace)
            kills, starts, runs = kills + made, starts + started, runs + 1
            numbers = numbers_of(file.with_suffix(""))
            differing += sum(numbers[key] != whole[key] for key in whole)
            lost += (_prompts(whole) - _prompts(numbers)).total()
            twice += (_prompts(numbers) - _prompts(whole)).total()
    return {
        "kills": len(kills),
        "of": Counter(kill.victim for kill in kills),
        "in": Counter(kill.phase for kill in kills),
        "runs": runs,
        "starts": starts,
        "differing": differing,
        "lost_prompts": lost,
        "prompts_twice": twice,
        "uninterrupted": asdict(pace),
        "each": [asdict(kill) for kill in kills],
    }


def _prompts(numbers: dict[str, Any]) -> Counter[Any]:
    return Counter((name, row["uid"], row["sample"]) for name, rows in numbers["rollouts"].items() for row in rows)
