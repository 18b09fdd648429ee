"""The real stack through slurm/train.sbatch: two Megatron ranks on one node of a Slurm, an engine on the other."""

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import samples
import yaml
from two_node_slurm import SECONDS, Slurm, two_node_slurm

from astar_megatron.run.tracking import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
ROOT = Path(__file__).parents[2]
STEPS = 4
ENVIRONMENT = {
    "ASTAR_PYTHON": sys.executable,
    "ASTAR_START_SECONDS": "300",
    "PYTHONPATH": f"{ROOT / 'tests' / 'e2e'}:{ROOT}",  # the reward, and the package
    "HF_HUB_OFFLINE": "1",
}


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with two_node_slurm(tmp_path_factory.mktemp("slurm")) as slurm:
        yield slurm


@pytest.fixture
def configure(tied_llama: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes the configuration of a small run with a name."""
    rows = [{"question": f"What is {a} + {b}?", "answer": str(a + b)} for a in range(4) for b in range(3)]
    prompts = samples.write_jsonl(tmp_path / "prompts.jsonl", rows)

    def write(name: str, **sections: Any) -> Path:
        tree = samples.run_tree(
            run_dir=name,
            model={"path": str(tied_llama), "dtype": "float32"},
            data={"path": str(prompts), "max_prompt_tokens": 100},
            reward={"name": "length_reward:reward"},
            sampling={"max_response_tokens": 9},
            train={"num_steps": STEPS, "batch_size": 8, "mini_batch_size": 4, "micro_batch_tokens": 90},
            rollout={"max_num_seqs": 16},
            cluster={"threads": 1, "start_timeout_seconds": 1500.0},
            **sections,
        )
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(tree))
        return file

    return write


def finish(slurm: Slurm, job: str, folder: Path) -> str:
    """Return a job's output when it has ended well and nothing of it is left."""
    state = slurm.wait(job)
    out = "".join(file.read_text() for file in sorted(folder.glob(f"{job}*.out")))
    assert state == "COMPLETED", out
    assert slurm.left_behind(job) == []
    return out


def test_a_run_that_is_signalled_saves_is_requeued_and_has_the_numbers_of_one_that_was_not(
    slurm: Slurm, configure: Callable[..., Path], tmp_path: Path
) -> None:
    sections = {"objective": {"name": "rebel"}, "parallel": {"tensor": 2}, "optim": {"lr": 1e-3}}
    script = ROOT / "slurm" / "train.sbatch"
    jobs = {}
    for name in ("whole", "parted"):
        file = configure(name, **sections)
        jobs[name] = slurm.submit("-N2", script, file.name, cwd=tmp_path, env=ENVIRONMENT)
        if name == "parted":
            until = time.monotonic() + SECONDS
            while not read_metrics(tmp_path / name):
                assert time.monotonic() < until, (tmp_path / f"{jobs[name]}.out").read_text()
                time.sleep(0.1)
            slurm.run("scancel", "--signal=USR1", "--batch", jobs[name])
        out = finish(slurm, jobs[name], tmp_path)
        assert ("requeued\n" in out) == (name == "parted"), out
    seats = json.loads((tmp_path / "whole" / "placement.json").read_text())
    assert "10.99.0.11" in str(seats) and "10.99.0.12" in str(seats)
    whole, parted = (read_metrics(tmp_path / name) for name in ("whole", "parted"))
    assert len(whole) == len(parted) == STEPS
    assert [line | samples.MEASURED for line in whole] == [line | samples.MEASURED for line in parted]
    weights, others = ((tmp_path / name / "hf" / "model.safetensors").read_bytes() for name in ("whole", "parted"))
    assert weights == others


def test_an_array_of_four_sweeps_fills_one_table_without_duplicates(
    slurm: Slurm, configure: Callable[..., Path], tmp_path: Path
) -> None:
    file = configure("swept", sweep={"num_samples": 4})
    job = slurm.submit("-N1", "--array=0-3", ROOT / "slurm" / "sweep.sbatch", file.name, cwd=tmp_path, env=ENVIRONMENT)
    finish(slurm, job, tmp_path)
    drawn: Counter[tuple[str, int]] = Counter()
    for shard in (tmp_path / "swept" / "v_star").glob("shard-*.parquet"):
        table = pq.read_table(shard, columns=["uid", "sample"])
        drawn.update(zip(table["uid"].to_pylist(), table["sample"].to_pylist(), strict=True))
    assert set(drawn.values()) == {1}
    assert len(drawn) == 12 * 4


def test_the_runs_of_a_study_are_jobs_and_the_study_run_again_runs_nothing(
    slurm: Slurm, configure: Callable[..., Path], tmp_path: Path
) -> None:
    held_out = [{"question": f"What is {a} + 7?", "answer": str(a + 7)} for a in range(3)]
    samples.write_jsonl(tmp_path / "held_out.jsonl", held_out)
    variables = [f"{name}={value}" for name, value in ENVIRONMENT.items()]
    file = configure("one", slurm={"backend": "sbatch", "nodes": 2, "gpus_per_node": 0, "env": variables})
    study = {
        "config": str(file),
        "set": {"data.eval_path": str(tmp_path / "held_out.jsonl")},
        "grid": [{"objective.name": ["rebel"], "optim.lr": [1e-4, 1e-3]}],
        "budgets": ["tokens=100", "tokens=200"],
        "seeds": [3],
        "out": "out",
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    command = [sys.executable, "-m", "astar_megatron.cli", "scale", "run", "study.yaml"]
    environment = {"PYTHONPATH": ENVIRONMENT["PYTHONPATH"], "HF_HUB_OFFLINE": "1"}
    out = slurm.run(*command, cwd=tmp_path, env=environment, seconds=1800)
    cells = json.loads((tmp_path / "out" / "scale.json").read_text())["cells"]
    assert {name: cell["runs"]["3"]["state"] for name, cell in cells.items()} == dict.fromkeys(cells, "finished"), out
    jobs = [line.split()[1].rstrip(":") for line in out.splitlines() if line.startswith("job ")]
    assert len(jobs) == len(cells) == 2 and [slurm.left_behind(job) for job in jobs] == [[], []]
    assert "job " not in slurm.run(*command, cwd=tmp_path, env=environment)
