"""A run of the whole loop on a tiny model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import samples

MakeTree = Callable[[Path], dict[str, Any]]


@pytest.fixture
def run_tree(tmp_path: Path) -> MakeTree:
    """Return a function from a model folder to the configuration tree of a small run in tmp_path."""

    def make(model: Path) -> dict[str, Any]:
        rows = [{"question": f"What is {a} + {b}?", "answer": str(a + b)} for a in range(4) for b in range(3)]
        prompts = samples.write_jsonl(tmp_path / "prompts.jsonl", rows)
        return samples.run_tree(
            run_dir=str(tmp_path / "run"),
            model={"path": str(model), "dtype": "float32"},
            data={"path": str(prompts), "max_prompt_tokens": 100},
            reward={"name": "length_reward:reward"},
            sampling={"max_response_tokens": 9},
            sweep={"num_samples": 2},
            train={"num_steps": 3, "batch_size": 10, "mini_batch_size": 5, "micro_batch_tokens": 90},
            optim={"lr": 1e-3},
            rollout={"max_num_seqs": 16},
            checkpoint={"interval": 2},
            eval={"interval": 2, "num_samples": 2, "max_prompts": 5},
        )

    return make
