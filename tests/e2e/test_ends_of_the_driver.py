"""However the driver ends, nothing of its run stays, and the same command goes on to the same numbers."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import samples
import yaml
from driver_process import driver

from astar_megatron.cluster.signals import RESUME
from astar_megatron.run.tracking import read_metrics

MEASURED = dict.fromkeys(("seconds", "tokens_per_second", "peak_memory_bytes"))  # no two runs agree on these
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
type Start = Callable[..., Any]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tied_llama: Path) -> Callable[..., Path]:
    """Return a function that writes the configuration of a small run and returns its file; the run folder is beside."""
    folder = tmp_path_factory.mktemp("runs")
    rows = [{"question": f"What is {a} + {b}?", "answer": str(a + b)} for a in range(4) for b in range(3)]
    prompts = samples.write_jsonl(folder / "prompts.jsonl", rows)

    def write(run: str, **sections: Any) -> Path:
        usual: dict[str, Any] = {
            "model": {"path": str(tied_llama), "dtype": "float32"},
            "data": {"path": str(prompts), "max_prompt_tokens": 100},
            "reward": {"name": "length_reward:reward"},
            "sampling": {"max_response_tokens": 9},
            "sweep": {"num_samples": 20, "table": str(folder / "v_star")},
            "train": {"num_steps": 4, "batch_size": 12, "mini_batch_size": 6, "micro_batch_tokens": 90},
            "optim": {"lr": 1e-3},
            "rollout": {"max_num_seqs": 16},
            "checkpoint": {"interval": 2},
            "eval": {"interval": 2, "max_prompts": 5},
        }
        tree = samples.run_tree(run_dir=str(folder / run), **usual)
        for name, section in sections.items():
            tree[name] = tree.get(name, {}) | section
        file = folder / f"{run}.yaml"
        file.write_text(yaml.safe_dump(tree))
        return file

    return write


@pytest.fixture(scope="module")
def table(files: Callable[..., Path]) -> Path:
    """The V* table of all runs, of a sweep that SIGTERM ended once; see the test of that."""
    file = files("table")
    folder = file.with_name("v_star")
    with driver("sweep", "--config", str(file)) as first:
        first.wait_for(lambda output: len(list(folder.glob("shard-*"))) >= 2)
        assert first.end(signal.SIGTERM) == RESUME
    with driver("sweep", "--config", str(file)) as second:
        assert second.process.wait() == 0, second.output()
    return folder


@pytest.fixture(scope="module")
def whole(files: Callable[..., Path], table: Path) -> list[dict[str, Any]]:
    """The metrics of a run that nothing ended."""
    file = files("whole")
    with driver("train", "--config", str(file)) as process:
        assert process.process.wait() == 0, process.output()
    return read_metrics(file.with_suffix(""))


def same(run: Path, whole: list[dict[str, Any]]) -> bool:
    """Whether a finished run has the numbers of the uninterrupted one."""
    lines = read_metrics(run)
    return [line | MEASURED for line in lines] == [line | MEASURED for line in whole] and (run / "hf").is_dir()


def steps(run: Path, number: int) -> Callable[[str], bool]:
    return lambda output: len(read_metrics(run)) >= number


def text(words: str) -> Callable[[str], bool]:
    return lambda output: words in output


def exists(run: Path, pattern: str) -> Callable[[str], bool]:
    return lambda output: bool(list(run.glob(pattern)))


def test_a_driver_killed_in_any_phase_leaves_nothing_and_the_same_command_has_the_same_numbers(
    files: Callable[..., Path], whole: list[dict[str, Any]]
) -> None:
    file = files("killed")
    run = file.with_suffix("")
    moments = {
        "Ray starts": lambda output: run.is_dir(),
        "engines and ranks start": text("engines run the model"),
        "the policy loads": text("starting the engines: "),
        "the first publish": text("weights go to the engines by"),
        "the second step": steps(run, 1),
        "a checkpoint is written": exists(run, "checkpoints/*.incomplete"),
        "an evaluation": text("eval_step_00000002, prompts, greedy: "),
        "the third step": steps(run, 3),
        "the export": exists(run, ".hf.new-*"),
    }
    for phase, moment in moments.items():
        with driver("train", "--config", str(file)) as process:
            process.wait_for(moment)
            assert process.end(signal.SIGKILL) == -signal.SIGKILL, phase
    with driver("train", "--config", str(file)) as process:
        assert process.process.wait() == 0, process.output()
    assert same(run, whole)
