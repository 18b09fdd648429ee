"""The real stack launched by sbatch and by nemo-run: a Megatron rank on one node of a Slurm, an engine on the other."""

import shutil
import sys
from pathlib import Path

import pytest
import samples
import yaml
from two_node_slurm import two_node_slurm

from astar_megatron.run.tracking import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
ROOT = Path(__file__).resolve().parents[2]
STEPS = 3


def test_sbatch_and_nemo_run_train_to_the_same_numbers(tied_llama: Path, tmp_path: Path) -> None:
    """Stage 1, then three steps, in jobs of their own."""
    if (nemorun := shutil.which("nemorun")) is None:
        pytest.skip("no nemorun on PATH: pip install '.[launch]' in an environment of its own")
    launchers = {"sbatch": sys.executable, "nemo-run": str(Path(nemorun).parent / "python")}
    rows = [{"question": f"What is {a} + {b}?", "answer": str(a + b)} for a in range(4) for b in range(3)]
    tree = samples.run_tree(
        model={"path": str(tied_llama), "dtype": "float32"},
        data={"path": str(samples.write_jsonl(tmp_path / "prompts.jsonl", rows)), "max_prompt_tokens": 100},
        reward={"name": "length_reward:reward"},
        sampling={"max_response_tokens": 9},
        sweep={"num_samples": 2},
        train={"num_steps": STEPS, "batch_size": 8, "micro_batch_tokens": 90},
        rollout={"max_num_seqs": 16},
        cluster={"threads": 1, "start_timeout_seconds": 1500.0},
        slurm={
            "nodes": 2,
            "gpus_per_node": 0,
            "stages": ["sweep", "train"],
            "env": [f"ASTAR_PYTHON={sys.executable}", "ASTAR_START_SECONDS=300", "HF_HUB_OFFLINE=1"],
        },
    )
    environment = {
        "PYTHONPATH": f"{ROOT / 'tests' / 'e2e'}:{ROOT}",  # the reward, and the package
        "NEMORUN_HOME": str(tmp_path / "nemo"),
    }
    (tmp_path / "slurm").mkdir()
    with two_node_slurm(tmp_path / "slurm") as slurm:
        for backend, python in launchers.items():
            (tmp_path / f"{backend}.yaml").write_text(yaml.safe_dump(tree | {"run_dir": backend}))
            words = ["--config", f"{backend}.yaml", "--backend", backend]
            launch = [python, "-m", "astar_megatron.cli", "launch", *words]
            printed = slurm.run(*launch, cwd=tmp_path, env=environment)
            for job in (line.split()[1].rstrip(":") for line in printed.splitlines() if line.startswith("job ")):
                assert slurm.wait(job) == "COMPLETED", [file.read_text() for file in tmp_path.rglob("driver-*.log")]
                assert slurm.left_behind(job) == []
    by_sbatch, by_nemo_run = (read_metrics(tmp_path / backend) for backend in launchers)
    assert len(by_sbatch) == STEPS
    assert [line | samples.MEASURED for line in by_sbatch] == [line | samples.MEASURED for line in by_nemo_run]
