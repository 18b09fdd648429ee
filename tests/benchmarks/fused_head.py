"""The LM head on a CPU: time and memory of the chunked head beside logits of the whole pack, in float32.

    OMP_NUM_THREADS=2 python tests/benchmarks/fused_head.py --shape small|large [--json FILE]     (1 and 5 minutes)

`plain` is torch's own cross entropy over hidden @ weight.T, the leanest way with all logits in memory. `at once` and
`again` are the two ways of model/head/fused.py to the loss and both gradients; `score` is the pass without gradients,
of the same responses and (`score long`) of one as long as the pack, too long to keep. Times are the fastest of several
runs that alternate. Memory is the highest resident size beside what was there and the gradients. --json adds to FILE.
"""

import argparse
import ctypes
import json
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from astar_megatron.model.head.chunked import TorchKernels
from astar_megatron.model.head.fused import FusedHead
from astar_megatron.model.head.interface import Responses, Vocabulary, sequence_sums

SHAPES = {"small": (4096, 576, 49152), "large": (2048, 1536, 151936)}  # T, H, V
RUNS = {"small": 4, "large": 2}
MIB = 1 << 20


def response_lengths(num_tokens: int) -> tuple[int, ...]:
    """Responses of 60 to 200 tokens that fill the pack."""
    rng, lengths = random.Random(0), []
    while sum(lengths) < num_tokens:
        lengths.append(min(rng.randrange(60, 201), num_tokens - sum(lengths)))
    return tuple(lengths)


class Passes:
    def __init__(self, tokens: int, hidden: int, columns: int) -> None:
        torch.manual_seed(0)
        self.hidden = torch.randn(tokens, hidden, requires_grad=True)
        self.weight = torch.randn(columns, hidden).mul_(0.05).requires_grad_()
        self.targets = torch.randint(columns, (tokens,))
        self.lengths = response_lengths(tokens)
        self.advantage = torch.randn(len(self.lengths))
        self.vocabulary = Vocabulary(size=columns)
        self.head = FusedHead(TorchKernels())

    def loss(self, sequences: slice, sums: Tensor) -> Tensor:
        return (1e-3 * sums - self.advantage[sequences]).square()

    def inputs(self, lengths: tuple[int, ...]) -> tuple[Any, Any, Any, Any]:
        return self.hidden, self.weight, Responses(targets=self.targets, lengths=lengths), self.vocabulary

    def plain_logprobs(self) -> Tensor:
        return -torch.nn.functional.cross_entropy(self.hidden @ self.weight.t(), self.targets, reduction="none")

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, (self.hidden, self.weight))

    def of_sums(self, logprobs: Tensor) -> tuple[Tensor, ...]:
        sums = sequence_sums(logprobs, self.lengths)
        return self.gradients(self.loss(slice(0, len(self.lengths)), sums).sum())

    def named(self) -> dict[str, Callable[[], Any]]:
        mine = self.inputs(self.lengths)
        return {
            "plain": lambda: self.of_sums(self.plain_logprobs()),
            "at once": lambda: self.gradients(self.head.sequence_loss(*mine, self.loss)),
            "again": lambda: self.of_sums(self.head.token_logprobs(*mine)),
            "plain score": torch.no_grad()(self.plain_logprobs),
            "score": torch.no_grad()(lambda: self.head.token_logprobs(*mine)),
            "score long": torch.no_grad()(lambda: self.head.token_logprobs(*self.inputs((len(self.hidden),)))),
        }


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def measure(run: Callable[[], Any]) -> tuple[float, int]:
    """Return seconds, and bytes at the peak beside what was there and what is returned."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before, peak, ended = resident_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.005):
            peak = max(peak, resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - start
    ended.set()
    watcher.join()
    returned = sum(tensor.nbytes for tensor in (result if isinstance(result, tuple) else (result,)))
    return seconds, peak - before - returned


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    passes = Passes(*SHAPES[arguments.shape])
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in passes.named()}
    for _ in range(RUNS[arguments.shape]):
        for name, run in passes.named().items():
            found[name].append(measure(run))
    report = {}
    for name, runs in found.items():
        base = found["plain score" if "score" in name else "plain"]
        seconds, memory = min(s for s, _ in runs), max(m for _, m in runs)
        report[name] = {
            "seconds": round(seconds, 2),
            "x plain": round(seconds / min(s for s, _ in base), 3),
            "MiB": round(memory / MIB),
            "memory of plain": round(memory / max(m for _, m in base), 4),
        }
        print(f"{arguments.shape} {name:12} {report[name]}")
    if arguments.json:
        whole = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
        setting = {"T, H, V": SHAPES[arguments.shape], "dtype": "float32", "threads": torch.get_num_threads()}
        whole[arguments.shape] = setting | {"torch": torch.__version__, "passes": report}
        arguments.json.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
