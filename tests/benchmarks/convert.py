"""HF -> Megatron -> HF of a model of Qwen2.5-1.5B's shapes, against `cp` of the same files. Prints JSON.

    python tests/benchmarks/convert.py [--rounds 3] [--folder FOLDER] [--out FILE] [--layers 28]

The model is random, in bfloat16 (3.1 GB), and written first; it lies in the page cache throughout, as does what `cp`
reads. In every round, one after the other: `cp -r` of the folder and an fsync of each file, `hf-to-megatron` (cut for
tensor=2) and `megatron-to-hf`, each in a process of its own that reports the seconds of the conversion itself (digests,
check for NaN, fsync of each file; without the start of Python) and by how much it raised the peak of its resident
memory. Right before each, as many bytes are written and removed: a virtual machine gives free pages back to its host
after two seconds, and to get them again costs whoever is first up to ten. The last round's files are then compared
byte by byte. Also the time to plan Qwen2.5-72B for 256 ranks.
"""

import argparse
import filecmp
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from gpu_models import SHAPES

from conversion import hf, rewrite
from conversion.ends import open_end
from conversion.families import model_from_config
from conversion.tiles import ParallelLayout

QWEN_72B = SHAPES["1.5b"] | {
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "vocab_size": 152064,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}


def peak_bytes() -> int:
    """The most this process has held so far, file pages included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def converted(direction: str, source: Path, target: Path) -> None:
    """One conversion, in this process; prints its seconds and what it added to the peak of memory."""
    torch.set_num_threads(1)  # as `astar convert`
    end = open_end(source)
    warm(source, target.parent)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from here on
    before, start = peak_bytes(), time.perf_counter()
    if direction == "hf-to-megatron":
        rewrite.write_megatron(end, target, ParallelLayout(tensor=2))
    else:
        rewrite.write_hf(end, target)
    print(json.dumps({"seconds": time.perf_counter() - start, "peak_bytes": peak_bytes() - before}))


def in_a_process(direction: str, source: Path, target: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--convert", direction, str(source), str(target)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def copied(source: Path, target: Path) -> float:
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    for path in target.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - start


def warm(source: Path, folder: Path) -> None:
    """Write and remove as many bytes: what is timed next gets their pages."""
    copied(source, folder / "warm")
    shutil.rmtree(folder / "warm")


def random_model(folder: Path, layers: int) -> Path:
    (folder / "config").mkdir()
    (folder / "config" / "config.json").write_text(json.dumps(SHAPES["1.5b"] | {"num_hidden_layers": layers}))
    generator = torch.Generator().manual_seed(0)
    with hf.writing(folder / "source", folder / "config", torch.bfloat16) as export:
        for tensor in export.tensors.values():
            tensor.copy_(torch.randint(-(2**15), 2**15, tensor.shape, generator=generator) / 2**17)
    return folder / "source"


def plan_seconds() -> float:
    model = model_from_config(QWEN_72B)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(model.config))
        start = time.perf_counter()
        rewrite.preview(open_end(folder, plan_only=True), ParallelLayout(tensor=8, pipeline=8, data=4))
        return time.perf_counter() - start


def measured(folder: Path, rounds: int, layers: int) -> dict[str, object]:
    source = random_model(folder, layers)
    runs = {
        "cp": lambda: {"seconds": warm(source, folder) or copied(source, folder / "cp"), "peak_bytes": 0},
        "megatron": lambda: in_a_process("hf-to-megatron", source, folder / "megatron"),
        "hf": lambda: in_a_process("megatron-to-hf", folder / "megatron", folder / "hf"),
    }
    measured_runs: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            shutil.rmtree(folder / name, ignore_errors=True)
            measured_runs[name].append(run())
    weights = sorted(path.name for path in source.glob("*.safetensors"))
    _, different, missing = filecmp.cmpfiles(source, folder / "hf", weights, shallow=False)
    seconds = {name: statistics.median(run["seconds"] for run in runs) for name, runs in measured_runs.items()}
    return {
        "bytes": sum((source / name).stat().st_size for name in weights),
        "rounds": rounds,
        "part_bytes": rewrite.PART_BYTES,
        "threads": rewrite.THREADS,
        "load_average": os.getloadavg()[0],
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "all_seconds": {name: [round(run["seconds"], 2) for run in runs] for name, runs in measured_runs.items()},
        "hf_to_megatron_over_cp": round(seconds["megatron"] / seconds["cp"], 2),
        "megatron_to_hf_over_cp": round(seconds["hf"] / seconds["cp"], 2),
        "peak_bytes": {name: max(int(run["peak_bytes"]) for run in measured_runs[name]) for name in ("megatron", "hf")},
        "round_trip_is_bitwise": not different and not missing,
        "plan_72b_seconds": round(plan_seconds(), 2),
    }


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--layers", type=int, default=28)
    arguments.add_argument(
        "--folder", type=Path, help="where to write about four times the model; on the disk to measure"
    )
    arguments.add_argument("--out", type=Path)
    arguments.add_argument("--convert", nargs=3, help=argparse.SUPPRESS)
    chosen = arguments.parse_args()
    if chosen.convert:
        converted(chosen.convert[0], Path(chosen.convert[1]), Path(chosen.convert[2]))
        return
    with tempfile.TemporaryDirectory(prefix="astar-benchmark-", dir=chosen.folder) as folder:
        text = json.dumps(measured(Path(folder), chosen.rounds, chosen.layers), indent=2)
    print(text)
    if chosen.out:
        chosen.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
