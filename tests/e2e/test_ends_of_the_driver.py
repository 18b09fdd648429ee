"""However the driver ends, nothing of its run stays, and the same command goes on to the same numbers (real stack)."""

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import samples
import yaml
from driver_process import Driver, driver

from astar_megatron.cluster.signals import RESUME
from astar_megatron.run.tracking import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
type Write = Callable[..., Path]


def write_run(folder: Path, model: Path, name: str, **sections: Any) -> Path:
    """Write the configuration of a small run and return its file; the run folder is beside."""
    rows = [{"question": f"What is {a} + {b}?", "answer": str(a + b)} for a in range(4) for b in range(3)]
    usual: dict[str, Any] = {
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"path": str(samples.write_jsonl(folder / "prompts.jsonl", rows)), "max_prompt_tokens": 100},
        "reward": {"name": "length_reward:reward"},
        "sampling": {"max_response_tokens": 9},
        "sweep": {"num_samples": 20, "table": str(folder / "v_star")},  # 240 rows, in shards of 32
        "train": {"num_steps": 7, "batch_size": 12, "mini_batch_size": 6, "micro_batch_tokens": 90},
        "optim": {"lr": 1e-3},
        "rollout": {"max_num_seqs": 16},
        "checkpoint": {"interval": 2},
        "eval": {"interval": 3, "max_prompts": 5},
    }
    tree = samples.run_tree(run_dir=str(folder / name), **usual)
    for key, section in sections.items():
        tree[key] = tree.get(key, {}) | section
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory, tied_llama: Path) -> Write:
    folder = tmp_path_factory.mktemp("runs")
    return lambda name, **sections: write_run(folder, tied_llama, name, **sections)


@pytest.fixture(scope="module")
def table(write: Write) -> Path:
    """The V* table of all runs, of a sweep that SIGTERM has ended and a second one that goes on."""
    file = write("table")
    folder = file.with_name("v_star")
    with driver("sweep", "--config", str(file)) as first:
        first.wait_for(lambda output: len(list(folder.glob("shard-*"))) >= 2)
        assert first.end(signal.SIGTERM) == RESUME
    with driver("sweep", "--config", str(file)) as second:
        assert second.process.wait() == 0, second.output()
        assert "stage 1, V* sweep: 240 " not in second.output()  # it draws what the first had not
    return folder


@pytest.fixture(scope="module")
def whole(write: Write, table: Path) -> list[dict[str, Any]]:
    """The metrics of a run that nothing ended."""
    file = write("whole")
    with driver("train", "--config", str(file)) as process:
        assert process.process.wait() == 0, process.output()
    return read_metrics(file.with_suffix(""))


def finish(file: Path, whole: list[dict[str, Any]]) -> None:
    """Let a run go on to its end, and assert that it has the numbers of the one that nothing ended."""
    with driver("train", "--config", str(file)) as process:
        assert process.process.wait() == 0, process.output()
    check(file.with_suffix(""), whole)


def check(run: Path, whole: list[dict[str, Any]]) -> None:
    assert [line | samples.MEASURED for line in read_metrics(run)] == [line | samples.MEASURED for line in whole]
    assert (run / "hf" / "config.json").is_file()
    assert not [path.name for path in run.rglob("*") if ".incomplete" in path.name or ".new-" in path.name]


def latest(run: Path) -> int:
    pointer = run / "checkpoints" / "latest"
    return int(pointer.read_text().removeprefix("step_")) if pointer.exists() else 0


def text(words: str) -> Callable[[str], bool]:
    return lambda output: words in output


def engines_have_started(times: int) -> Callable[[str], bool]:
    return lambda output: len(re.findall(r"^starting the engines: [\d.]+ s$", output, re.MULTILINE)) >= times


def steps(run: Path, number: int) -> Callable[[str], bool]:
    return lambda output: len(read_metrics(run)) >= number


def exists(run: Path, pattern: str) -> Callable[[str], bool]:
    return lambda output: bool(list(run.glob(pattern)))


def test_a_driver_that_is_killed_in_any_phase_leaves_nothing(write: Write, whole: list[dict[str, Any]]) -> None:
    file = write("killed")
    run = file.with_suffix("")
    moments = {
        "Ray starts": exists(run, "train.lock"),
        "engines and ranks start": text("engines run the model"),
        "the policy loads": engines_have_started(1),
        "the first publish": text("weights go to the engines by"),
        "a step": steps(run, 1),
        "a checkpoint is written": exists(run, "checkpoints/*.incomplete"),
        "an evaluation": text("eval_step_00000003, prompts, greedy: "),
        "the export": exists(run, ".hf.new-*"),
    }
    for phase, moment in moments.items():
        with driver("train", "--config", str(file)) as process:
            process.wait_for(moment)
            assert process.end(signal.SIGKILL) == -signal.SIGKILL, phase
    finish(file, whole)


def test_signals_end_a_run_where_a_step_is_saved_and_at_once_where_none_is_taken(
    write: Write, whole: list[dict[str, Any]]
) -> None:
    """Each is sent to the process group, as `timeout` and terminals do: Ray's processes are not in it."""
    file = write("asked", checkpoint={"interval": 100})
    run = file.with_suffix("")

    def ended(moment: Callable[[str], bool], *signals: signal.Signals, **options: Any) -> int:
        with driver("train", "--config", str(file)) as process:
            process.wait_for(moment)
            return process.end(*signals, group=True, **options)

    assert ended(text("engines run the model"), signal.SIGTERM) == RESUME
    assert ended(text("weights go to the engines by"), signal.SIGUSR1) == RESUME
    done = len(read_metrics(run))
    assert 1 <= done == latest(run) < 7
    assert ended(steps(run, done + 1), signal.SIGINT) == 130
    assert latest(run) == done
    assert ended(text("weights go to the engines by"), signal.SIGTERM, signal.SIGUSR1) == RESUME
    write("asked", checkpoint={"interval": 100}, train={"grace_seconds": 5.0})  # less than the processes need to end
    assert ended(steps(run, latest(run) + 1), signal.SIGUSR1) == RESUME
    write("asked", checkpoint={"interval": 100})
    finish(file, whole)


def test_a_supervised_run_is_started_again_when_its_driver_was_killed(
    write: Write, whole: list[dict[str, Any]]
) -> None:
    file = write("supervised", checkpoint={"interval": 1})
    run = file.with_suffix("")
    with driver("train", "--supervise", "--config", str(file)) as process:
        for done in (2, 4):
            process.wait_for(steps(run, done))
            os.kill(process.child(), signal.SIGKILL)
        assert process.process.wait() == 0, process.output()
        assert "restart 1" in process.output() and "restart 2" in process.output()
    check(run, whole)


def test_what_a_restart_does_not_mend_leaves_a_bundle(
    write: Write, table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", samples.path_without("py-spy"))
    file = write("broken")
    run = file.with_suffix("")

    def kill_when_the_policy_starts(process: Driver, restarts: int) -> None:
        process.wait_for(engines_have_started(restarts + 1))
        os.kill(process.child(), signal.SIGKILL)

    with driver("train", "--supervise", "--config", str(file)) as process:
        for restarts in range(2):
            kill_when_the_policy_starts(process, restarts)
        assert process.process.wait() == 128 + signal.SIGKILL, process.output()
        assert not read_metrics(run)
        (bundle,) = run.glob("bundle_*")
        last = process.output().splitlines()[-1]
        assert "the last restart brought no step beyond 0" in last and str(bundle) in last
    assert "engines run the model" in (bundle / "output.txt").read_text()
    assert "by faulthandler" in (bundle / "logs" / "stacks.txt").read_text()
    assert any("most recent call first" in path.read_text() for path in (bundle / "logs").glob("worker-*.err"))
