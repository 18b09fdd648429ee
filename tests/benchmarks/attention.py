"""Attention of a CPU over packs with a shared prefix: as it is, against all padded to the longest. Prints JSON.

    OMP_NUM_THREADS=2 PYTHONPATH=. python tests/benchmarks/attention.py [--rounds 3] [--out FILE]

One layer of SmolLM2-135M's shape, float32, forward and backward, packs of 8,192 tokens with a prefix of 20. `alike` has
responses of 200 to 256 tokens, `reasoning` those of a log-normal distribution (median 200) cut at 1,024, `one long` one
of 1,024 and the rest of 40. Seconds are medians, `saved_mib` what the forward pass keeps for the backward pass.
"""

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

TOKENS, PREFIX, LONGEST = 8192, 20, 1024
HEADS, KEY_VALUE_HEADS, HEAD_SIZE = 9, 3, 64


def lengths_of(kind: str) -> tuple[int, ...]:
    """Return own parts that fill a pack."""
    chance, lengths = random.Random(0), []
    while (left := TOKENS - PREFIX - sum(lengths)) > 0:
        length = {
            "alike": chance.randint(200, 256),
            "reasoning": min(LONGEST, int(chance.lognormvariate(5.3, 1))),
            "one long": 40 if lengths else LONGEST,
        }[kind]
        lengths.append(min(left, max(1, length)))
    return tuple(lengths)


def measured(attention: Any, lengths: tuple[int, ...]) -> dict[str, float]:
    """Return the seconds of a forward and backward pass, and the MiB that lie between them."""
    from astar_megatron.model.attention import PackedSequences

    shapes = (HEADS, KEY_VALUE_HEADS, KEY_VALUE_HEADS)
    streams = [torch.randn(TOKENS, 1, heads, HEAD_SIZE, requires_grad=True) for heads in shapes]
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    packed = PackedSequences(prefix_tokens=PREFIX, lengths=lengths)
    start = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = attention(*streams, packed_seq_params=packed)
    out.sum().backward()
    return {"seconds": time.perf_counter() - start, "saved_mib": sum(saved.values()) / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    from astar_megatron.model import backend

    backend.choose()  # megatron asks for it before it is imported
    from astar_megatron.model import attention as module

    attention: Any = module.PackedAttention.__new__(module.PackedAttention)
    torch.nn.Module.__init__(attention)
    attention.scale, attention.config = HEAD_SIZE**-0.5, SimpleNamespace()
    most_padding, result = module._MAX_PADDING, {}
    for kind in ("alike", "reasoning", "one long"):
        lengths, rows = lengths_of(kind), {"as it is": [], "padded": []}
        for _ in range(arguments.rounds + 1):  # the first does not count
            for way, bound in (("as it is", most_padding), ("padded", float("inf"))):
                module._MAX_PADDING = bound
                rows[way].append(measured(attention, lengths))
        medians = {
            way: {name: statistics.median(row[name] for row in each[1:]) for name in each[0]}
            for way, each in rows.items()
        }
        medians["ratio"] = {name: medians["padded"][name] / medians["as it is"][name] for name in medians["padded"]}
        result[kind] = {"sequences": len(lengths)} | {
            way: {name: round(figure, 2) for name, figure in figures.items()} for way, figures in medians.items()
        }
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
