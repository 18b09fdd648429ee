"""Engines and ranks that are killed or stopped at any moment: the run goes on to the numbers that it would have had."""

import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from samples import MEASURED_AFTER_DEATHS
from sweep_jobs import rows

from astar_megatron import config
from astar_megatron.cluster.actors import alive_pid
from astar_megatron.cluster.processes import process_tree
from astar_megatron.run.fleet import Fleet, engines_of
from astar_megatron.run.prepare import prepare
from astar_megatron.run.tracking import Tracker, read_metrics
from astar_megatron.run.training import stage_1
from astar_megatron.sweep import sweep
from astar_megatron.train import train_whatever_dies

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """`signal` to the actor of the first engine that runs, to vLLM's core in it, or to the only rank, in a step."""

    step: int
    moment: str  # update, generation, training; start: of the rank that takes a killed one's place
    process: str  # actor, core, rank
    signal: int = signal.SIGKILL


# Name: how many engines, and what happens. With one engine each step waits for its replacement. Of the ranks: before
# there is a checkpoint, which comes every second step, while it starts anew, and twice after. By turns policy and
# engine share memory.
CASES = {
    "engine": (
        1,
        [
            Fault(step=1, moment="generation", process="core"),
            Fault(step=2, moment="update", process="actor"),
            Fault(step=3, moment="generation", process="actor", signal=signal.SIGSTOP),
            Fault(step=4, moment="update", process="core", signal=signal.SIGSTOP),
        ],
    ),
    "one of two": (2, [Fault(step=1, moment="generation", process="actor")]),
    "one of three": (
        3,
        [
            Fault(step=1, moment="update", process="actor"),
            Fault(step=2, moment="update", process="core", signal=signal.SIGSTOP),  # the others wait for it
            Fault(step=3, moment="generation", process="core"),
        ],
    ),
    "rank": (
        1,
        [
            Fault(step=1, moment="training", process="rank"),
            Fault(step=1, moment="start", process="rank"),
            Fault(step=3, moment="generation", process="rank"),
            Fault(step=4, moment="update", process="rank"),
        ],
    ),
    "by turns": (
        1,
        [
            Fault(step=1, moment="generation", process="core"),
            Fault(step=2, moment="generation", process="rank"),
            Fault(step=2, moment="start", process="rank"),
            Fault(step=3, moment="training", process="core"),
            Fault(step=4, moment="training", process="rank"),
        ],
    ),
}


def process_of(actor: Any) -> int:
    pid = alive_pid(actor._actor_id.hex())
    assert pid is not None
    return pid


def pid_of(fleet: Fleet, fault: Fault) -> int:
    handle = fleet.policy._ranks[0] if fault.process == "rank" else fleet.engines.running()[0].actor
    actor = process_of(handle)
    if fault.process != "core":
        return actor
    (core,) = (
        pid for pid in process_tree(actor) if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"VLLM::EngineCore")
    )
    return core


def has_come(fleet: Fleet, run_dir: str, fault: Fault, versions: list[int | None], done: list[int]) -> bool:
    """Whether a fault's moment is now; `versions` are those that have been looked at: what engines and policy had.

    `done` are the processes of the faults before.
    """
    if fault.moment == "start":
        return alive_pid(fleet.policy._ranks[0]._actor_id.hex()) not in (None, *done)
    if len(read_metrics(run_dir)) < fault.step or not fleet.engines.serving():
        return False
    versions.append(fleet._published)
    return {
        "update": fleet._moving.locked(),
        "generation": len(fleet.engines._streams) > 0,
        "training": fault.step in versions and versions[-1] is None,
    }[fault.moment]


def inject(fleet: Fleet, run_dir: str, faults: list[Fault], done: list[int], ended: threading.Event) -> None:
    for fault in faults:
        versions: list[int | None] = []
        while not has_come(fleet, run_dir, fault, versions, done):
            if ended.wait(0.001):
                return
        done.append(pid_of(fleet, fault))
        os.kill(done[-1], fault.signal)


def run(tree: dict[str, Any], folder: Path, faults: list[Fault]) -> tuple[list[dict[str, Any]], bytes]:
    """Train with faults, each of which must come about; return the metrics and the final weights."""
    cfg = config.validate(tree | {"run_dir": str(folder)})
    inputs, tracker = prepare(cfg), Tracker(cfg.run_dir)
    done: list[int] = []
    ended = threading.Event()
    with Fleet(cfg, inputs.model, tracker) as fleet:
        sweep(cfg, inputs, fleet.engines, tracker)
        killer = threading.Thread(target=inject, args=(fleet, cfg.run_dir, faults, done, ended))
        killer.start()
        train_whatever_dies(cfg, inputs, stage_1(cfg, inputs), fleet, tracker)
        ended.set()
        killer.join()
    assert len(done) == len(faults)
    assert not [pid for pid in done if Path(f"/proc/{pid}").exists()]  # a stopped one either
    return read_metrics(cfg.run_dir), (cfg.export_dir / "model.safetensors").read_bytes()


@pytest.mark.parametrize("case", CASES)
def test_a_run_in_which_something_dies_ends_with_the_numbers_of_a_whole_one(
    case: str, run_tree: Any, tied_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    (num_engines, faults), tree = CASES[case], run_tree(tied_llama)
    tree["sampling"]["max_response_tokens"] = 60
    tree["train"] |= {"num_steps": 5, "micro_batch_tokens": 300}
    tree["rollout"] |= {"num_engines": num_engines, "max_num_seqs": 2, "heartbeat_seconds": 60.0}
    tree |= {"conversion": {"bucket_bytes": 4096}, "cluster": {"threads": 1, "start_timeout_seconds": 1200.0}}
    tree["cluster"] |= {"share_gpus": True} if case == "by turns" else {}
    del tree["eval"]
    lines, weights = run(tree, tmp_path / "killed", faults)
    whole, same = run(tree, tmp_path / "whole", [])
    assert [line | MEASURED_AFTER_DEATHS for line in lines] == [line | MEASURED_AFTER_DEATHS for line in whole]
    assert weights == same
    killed = {
        kind: sum((fault.process == "rank") == (kind == "rank") for fault in faults) for kind in ("rank", "engine")
    }
    num_replaced = sum(line["engines_replaced"] for line in lines)
    assert num_replaced <= killed["engine"]
    if num_engines == 1 and not killed["rank"]:  # else the last may be on its way, or its step be taken again
        assert num_replaced == killed["engine"]
    assert sum(line["engines_replaced"] for line in whole) == 0


def test_a_sweep_whose_engine_dies_has_the_rows_of_a_whole_one(
    run_tree: Any, tied_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no policy here: a new engine is proved to hold what the folder does."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    tree = run_tree(tied_llama)
    tree["sweep"]["num_samples"], tree["cluster"] = 10, {"threads": 1, "start_timeout_seconds": 1200.0}
    tables = []
    for name, dies in (("killed", True), ("whole", False)):
        cfg = config.validate(tree | {"run_dir": str(tmp_path / name)})
        inputs, tracker = prepare(cfg), Tracker(cfg.run_dir)
        with engines_of(cfg, tracker) as engines:
            pid = process_of(engines.running()[0].actor)

            def kill(pool: Any = engines, pid: int = pid) -> None:
                while not pool._streams:
                    time.sleep(0.001)
                os.kill(pid, signal.SIGKILL)

            if dies:
                threading.Thread(target=kill).start()
            sweep(cfg, inputs, engines, tracker)
            assert engines.num_replaced() == dies
        tables.append(rows(tmp_path / name))
    killed, whole = tables
    assert len(killed) == len(whole) == 120
    for row, other in zip(killed, whole, strict=True):
        assert row.pop("logprob") == pytest.approx(other.pop("logprob"), abs=1e-4)  # summed in another batch
        assert row == other
