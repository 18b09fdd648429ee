"""A run over two nodes has the numbers that it has on one: ranks and engines apart, and a pipeline across both."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import samples
import yaml
from two_nodes import Nodes, two_nodes

from astar_megatron.run.tracking import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
REWARD_FOLDER = Path(__file__).parents[1] / "e2e"
SECONDS = 1500.0
STEPS = 4


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with two_nodes(REWARD_FOLDER) as nodes:
        yield nodes


@pytest.fixture
def run(tied_llama: Path, tmp_path: Path) -> Any:
    """Return a function that writes the configuration of a small run with a name, and gives its command and folder."""
    rows = [{"question": f"What is {a} + {b}?", "answer": str(a + b)} for a in range(4) for b in range(3)]
    prompts = samples.write_jsonl(tmp_path / "prompts.jsonl", rows)

    def write(name: str, address: str | None = None, **sections: Any) -> tuple[list[str], Path]:
        tree = samples.run_tree(
            run_dir=str(tmp_path / name),
            model={"path": str(tied_llama), "dtype": "float32"},
            data={"path": str(prompts), "max_prompt_tokens": 100},
            reward={"name": "length_reward:reward"},
            objective={"name": "rebel"},
            sampling={"max_response_tokens": 9},
            train={"num_steps": STEPS, "batch_size": 8, "mini_batch_size": 4, "micro_batch_tokens": 90},
            optim={"lr": 1e-3},
            rollout={"max_num_seqs": 16},
            cluster={"address": address, "threads": 1, "start_timeout_seconds": SECONDS},
            **{"checkpoint": {"interval": 1}} | sections,
        )
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(tree))
        return [sys.executable, "-m", "astar_megatron.cli", "train", "--config", str(file)], tmp_path / name

    return write


def on_one_node(command: list[str], folder: Path) -> None:
    path = os.pathsep.join([str(REWARD_FOLDER), str(Path(__file__).parents[2])])
    env = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, cwd=folder.parent, env=env, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr


def check_equal(folder: Path, other: Path) -> None:
    """The same losses, rewards and weights, to the last bit."""
    lines, others = read_metrics(folder), read_metrics(other)
    assert len(lines) == len(others) == STEPS
    assert [line | samples.MEASURED for line in lines] == [line | samples.MEASURED for line in others]
    weights, other_weights = ((run / "hf" / "model.safetensors").read_bytes() for run in (folder, other))
    assert weights == other_weights


def test_ranks_on_one_node_and_engines_on_the_other_compute_as_on_one_node_after_a_kill_too(
    nodes: Nodes, run: Any
) -> None:
    """The driver is killed after two steps or three of four; the same command goes on from the shared folder."""
    on_one_node(*(whole := run("whole")))
    command, folder = run("apart", nodes.address)
    with nodes.begin(0, command, cwd=folder.parent) as first:
        until = time.monotonic() + SECONDS
        while len(read_metrics(folder)) < 2 and first.poll() is None and time.monotonic() < until:
            time.sleep(0.2)
        nodes.kill(first, signal.SIGKILL)
    assert 2 <= len(read_metrics(folder)) < STEPS
    status, out = nodes.run(*command, cwd=folder.parent, seconds=SECONDS)
    assert status == 0, out
    assert "weights go to the engines by gloo: policy, engines and their driver are on CPUs and see 2 different" in out
    check_equal(folder, whole[1])


def test_a_pipeline_over_both_nodes_computes_as_on_one_node(nodes: Nodes, run: Any) -> None:
    changes: dict[str, Any] = {"parallel": {"pipeline": 2}, "checkpoint": {"interval": 2}}
    on_one_node(*(whole := run("whole", **changes)))
    command, folder = run("across", nodes.address, **changes)
    status, out = nodes.run(*command, cwd=folder.parent, seconds=SECONDS)
    assert status == 0, out
    check_equal(folder, whole[1])
