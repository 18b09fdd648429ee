"""Policy and engine on one GPU, by turns: what a turn takes, and whether each side gives back the same every time.

    PYTHONPATH=. python3 tests/benchmarks/gpu_sharing.py [--steps 100] [--set KEY=VALUE ...] [--json FILE]

`astar train` with Qwen2.5-1.5B's shape, random weights and `cluster.share_gpus: true`; steps are small (16 responses of
64 tokens), for only the turns and the publish are looked at. Between two steps the engine sleeps, the policy steps and
gives back, the engine wakes to its weights, gets them with the whole check, and wakes to keys and values. The first
step is not counted: it opens the way for the weights. `to publish` is the policy's release and the engine's wake to its
weights, `to generate` its wake to keys and values, `to train` its sleep and what the policy takes again. It ends with
status 1 where all three and the publish take longer than 0.8 s (the median), or bytes differ by more than 64 MiB.
`--shape tiny` runs on a CPU, to see that this program does.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from gpu_models import SHAPES, write_model

from astar_megatron.run.tracking import read_metrics

ROOT = Path(__file__).resolve().parents[2]
MOST_SECONDS = 0.8  # of a turn with its publish, on an H100 or H200 at 1.5B
MOST_BYTES = 64 << 20  # by which what a side gives back may differ
PARTS = ("to publish", "to generate", "to train")  # the driver's spans named `turns` of a step, in their order
TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"
REWARD = "def reward(response, answer):\n    return float(len(response) % 2)  # so that there is something to learn\n"


def write_run(folder: Path, shape: str, steps: int) -> Path:
    """Write all that a run of more than `steps` steps reads, and return its configuration."""
    import yaml
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = write_model(folder / "model", shape)
    letters = pre_tokenizers.ByteLevel.alphabet()  # of Qwen2's tokenizers, which transformers makes of any for a Qwen2
    size, end = SHAPES[shape]["vocab_size"], SHAPES[shape]["eos_token_id"]
    words = [*letters, *(f"w{token}" for token in range(len(letters), size))]
    tokenizer = Tokenizer(models.BPE({word: token for token, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=words[end], chat_template=TEMPLATE)
    made.save_pretrained(model)
    rows = (json.dumps({"question": f"problem {row:>24}", "answer": "odd"}) + "\n" for row in range(64))
    (folder / "prompts.jsonl").write_text("".join(rows))
    (folder / "odd_length.py").write_text(REWARD)
    tree = {
        "run_dir": "run",
        "model": {"path": "model"},
        "data": {"path": "prompts.jsonl"},
        "reward": {"name": "odd_length:reward"},
        "objective": {"name": "grpo"},
        "grpo": {"group_size": 4},
        "sampling": {"max_response_tokens": 64},
        "train": {"num_steps": steps + 2, "batch_size": 16, "mini_batch_size": 16, "micro_batch_tokens": 4096},
        "optim": {"lr": 1e-6},
        "rollout": {"num_engines": 1, "max_num_seqs": 16, "keep": 1},
        "cluster": {"share_gpus": True},
        "checkpoint": {"interval": steps + 2},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    return folder / "run.yaml"


def steps_of(config: Path, steps: int, settings: Sequence[str]) -> list[dict[str, Any]]:
    """Train for a first step and `steps` more, end the run, and return the lines of metrics of these."""
    changes = [argument for setting in settings for argument in ("--set", setting)]
    command = [sys.executable, "-m", "astar_megatron.cli", "train", "--config", config.name, *changes]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    run_dir = config.parent / "run"
    with subprocess.Popen(command, cwd=config.parent, env=os.environ | {"PYTHONPATH": path}) as program:
        try:
            while len(read_metrics(run_dir)) <= steps:
                if program.poll() is not None:
                    sys.exit(f"astar train ended with {program.returncode} before step {steps}; its output is above")
                time.sleep(0.5)
        finally:
            program.send_signal(signal.SIGINT)  # at once, without a checkpoint
    return read_metrics(run_dir)[1 : steps + 1]


def figures(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the table: medians in seconds, and the smallest and the largest of bytes."""
    parts: dict[str, list[float]] = {part: [] for part in PARTS}
    for line in lines:
        turns = [end - start for name, who, start, end in line["timeline"] if (name, who) == ("turns", "driver")]
        for part, seconds in zip(PARTS, turns, strict=True):
            parts[part].append(seconds)
    sums = [line["seconds"]["turns"] + line["seconds"]["publish"] for line in lines]
    return {
        "steps": len(lines),
        **{f"{part}, s": round(median(seconds), 3) for part, seconds in parts.items()},
        "publish, s": round(median(line["seconds"]["publish"] for line in lines), 3),
        "turns and publish, s": round(median(sums), 3),
        "their largest, s": round(max(sums), 3),
        **{
            f"{name}, {word}": bound(size for line in lines for size in line[name] if size is not None)
            for name in ("kept_bytes", "returned_bytes")
            for word, bound in (("least", min), ("most", max))
        },
    }


def faults(row: dict[str, Any], shape: str) -> list[str]:
    """Return in words what falls short."""
    shortfalls = []
    if shape == "1.5b" and row["turns and publish, s"] > MOST_SECONDS:
        shortfalls.append(f"turn and publish take {row['turns and publish, s']} s, expected {MOST_SECONDS} at most")
    for name in ("kept_bytes", "returned_bytes"):
        if row[f"{name}, most"] - row[f"{name}, least"] > MOST_BYTES:
            shortfalls.append(f"{name} go from {row[f'{name}, least']} to {row[f'{name}, most']}, expected the same")
    return shortfalls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1.5b", choices=SHAPES)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the run, as in astar")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = write_run(Path(folder), arguments.shape, arguments.steps)
        row = {"shape": arguments.shape} | figures(steps_of(config, arguments.steps, arguments.set))
    for name, figure in row.items():
        print(f"{name:>22}  {figure}")
    if arguments.json:
        arguments.json.write_text(json.dumps(row, indent=1) + "\n")
    if problems := faults(row, arguments.shape):
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
