"""What runs compute, to the last bit: to see that a change that should change no number changes none.

    python tests/e2e/numbers_of_runs.py          writes numbers.json for this kind of machine

Products differ from one kind of CPU to the next, so the file has an entry a kind.
"""

import hashlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
FILE = Path(__file__).with_name("numbers.json")
# Of a line of metrics: what no two runs agree on, and what is new in a later version, is left out.
_METRICS = (
    *("step", "version", "reward_mean", "v_star_mean", "v_star_shift", "loss", "grad_norm", "lr", "skipped_steps"),
    *("logratio_mean", "logratio_std", "logratio_max", "kl_sequence", "entropy", "residual_mean", "slope"),
    *("engine_gap", "truncated", "tokens", "response_tokens", "model_flops", "spent_tokens", "eval"),
)
_TABLE = ("uid", "sample", "reward", "response", "finish_reason", "seed", "logprob")
# Name: model, what the configuration changes. One rank and four, tied and untied, both types, V* refreshed and weighed.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "one rank": ("tied_llama", {}),
    "bfloat16": ("untied_qwen2", {"model": {"dtype": "bfloat16"}}),
    "TP2 PP2": (
        "untied_qwen2",
        {"parallel": {"tensor": 2, "pipeline": 2}, "astar": {"refresh_decay": 0.9, "importance_cap": 2.0}},
    ),
}


def kind_of_machine() -> str:
    """Return what decides how products are rounded here."""
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    vendor = next(line.partition(":")[2].strip() for line in cpuinfo.splitlines() if line.startswith("vendor_id"))
    bfloat16 = " with bfloat16" if "avx512_bf16" in cpuinfo else ""
    return f"{vendor} {torch.backends.cpu.get_cpu_capability()}{bfloat16}, torch {torch.__version__.partition('+')[0]}"


def numbers_of(tree: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Sweep and train as a user would; return rewards, responses and losses of both stages and the final weights."""
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(dict(tree)), encoding="utf-8")
    path = os.pathsep.join([str(Path(__file__).parent), str(ROOT)])
    for program in ("sweep", "train"):
        command = [sys.executable, "-m", "astar_megatron.cli", program, "--config", str(file)]
        subprocess.run(command, check=True, cwd=folder, env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"})
    run_dir = Path(tree["run_dir"])
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    weights = load_file(run_dir / "hf" / "model.safetensors")
    return {
        "stage 1": _table(run_dir / "v_star", _TABLE),
        "stage 1 without log-probs": _table(run_dir / "v_star", [name for name in _TABLE if name != "logprob"]),
        "metrics": [{key: line[key] for key in _METRICS if key in line} for line in lines],
        "evaluations": {path.name: _digest(path.read_bytes()) for path in sorted(run_dir.glob("eval*.jsonl"))},
        "weights": _digest(*(_bytes(weights[name]) for name in sorted(weights))),
    }


def _table(folder: Path, columns: Sequence[str]) -> str:
    table = pa.concat_tables([pq.read_table(path, columns=list(columns)) for path in folder.glob("shard-*.parquet")])
    rows = table.sort_by([("uid", "ascending"), ("sample", "ascending")]).to_pylist()
    return _digest(json.dumps(rows).encode())


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:16]


def merged(tree: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tree with the sections' keys of `changes` in place of its own."""
    return tree | {
        key: {**tree.get(key, {}), **value} if isinstance(value, dict) else value for key, value in changes.items()
    }


def demo_tree(folder: Path) -> dict[str, Any]:
    """Return three steps of the demo, in the type that this machine takes, with model and prompts made in `folder`."""
    sys.path.insert(0, str(ROOT / "examples"))
    ensure_model = importlib.import_module("smollm2").ensure_model
    from astar_megatron.data.arithmetic import one_digit_additions, write_jsonl

    tree = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text(encoding="utf-8"))
    ensure_model(folder / "model")
    write_jsonl(folder / "prompts.jsonl", one_digit_additions())
    changes = {
        "run_dir": str(folder / "run"),
        "model": {"path": str(folder / "model")},
        "data": {"path": str(folder / "prompts.jsonl")},
        "train": {"num_steps": 3},
        "eval": {"interval": None},
        "cluster": {"threads": 2},
    }
    return merged(tree, changes)


def write(numbers: Mapping[str, Any]) -> None:
    """Put this machine's numbers into the file beside this one."""
    known = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    known[kind_of_machine()] = dict(numbers)
    FILE.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        environment = os.environ | {"ASTAR_NUMBERS_FILE": str(Path(made) / "numbers.json")}
        test = [sys.executable, "-m", "pytest", "-m", "slow", str(Path(__file__).with_name("test_same_numbers.py"))]
        subprocess.run(test, check=False, cwd=ROOT, env=environment)
        write(json.loads(Path(environment["ASTAR_NUMBERS_FILE"]).read_text(encoding="utf-8")))
