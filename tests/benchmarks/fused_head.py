r"""The LM head on a CPU: time and memory of the chunked head beside logits of the whole pack, in float32.

    OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0 \
        python tests/benchmarks/fused_head.py --shape small|large --pass NAME [--json FILE]

(the environment that model/backend.py gives to ranks on a CPU)

`plain` is torch's own cross entropy over hidden @ weight.T, the leanest way with all logits in memory. The passes:
`at-once`, the loss and both gradients; `score`, the pass without gradients, and `score-long`, the same for one response
as long as the pack, too long to be kept. Each alternates with its plain; times are the fastest run's, in wall-clock
seconds and in seconds of all threads. Memory is the highest resident size beside what was there and the gradients;
"load" is the system's, of the last minute. --json adds to FILE. Half a minute (small) to three a pass on idle cores.
"""

import argparse
import ctypes
import json
import os
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
RUNS = {"small": 4, "large": 3}
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

    def loss(self, sequences: slice, logprobs: Tensor) -> Tensor:
        sums = sequence_sums(logprobs, self.lengths[sequences])
        return (1e-3 * sums - self.advantage[sequences]).square()

    def inputs(self, lengths: tuple[int, ...]) -> tuple[Any, Any, Any, Any]:
        return self.hidden, self.weight, Responses(targets=self.targets, lengths=lengths), self.vocabulary

    def plain_logprobs(self) -> Tensor:
        return -torch.nn.functional.cross_entropy(self.hidden @ self.weight.t(), self.targets, reduction="none")

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, (self.hidden, self.weight))

    def of_sums(self, logprobs: Tensor) -> tuple[Tensor, ...]:
        return self.gradients(self.loss(slice(0, len(self.lengths)), logprobs).sum())

    def named(self) -> dict[str, Callable[[], Any]]:
        mine = self.inputs(self.lengths)
        return {
            "plain": lambda: self.of_sums(self.plain_logprobs()),
            "at-once": lambda: self.gradients(self.head.sequence_loss(*mine, self.loss)),
            "plain-score": torch.no_grad()(self.plain_logprobs),
            "score": lambda: self.head.token_logprobs(*mine),
            "score-long": lambda: self.head.token_logprobs(*self.inputs((len(self.hidden),))),
        }


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def measure(run: Callable[[], Any]) -> tuple[float, float, int]:
    """Return wall-clock seconds, all threads' seconds, and bytes at the peak beside what was there and is returned."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before, peak, ended = resident_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.005):
            peak = max(peak, resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    wall, threads = time.perf_counter(), time.process_time()
    result = run()
    wall, threads = time.perf_counter() - wall, time.process_time() - threads
    ended.set()
    watcher.join()
    returned = sum(tensor.nbytes for tensor in (result if isinstance(result, tuple) else (result,)))
    return wall, threads, peak - before - returned


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--pass", dest="name", choices=["at-once", "score", "score-long"], required=True)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    passes = Passes(*SHAPES[arguments.shape]).named()
    base = "plain-score" if "score" in arguments.name else "plain"
    figures_of: dict[str, list[tuple[float, float, int]]] = {base: [], arguments.name: []}
    for _ in range(RUNS[arguments.shape]):
        for name, runs in figures_of.items():
            runs.append(measure(passes[name]))
            print(arguments.shape, name, *(round(figure, 2) for figure in runs[-1]), flush=True)
    plain, fused = ([min(column) for column in zip(*runs, strict=True)] for runs in figures_of.values())
    report = {
        "seconds": [round(fused[0], 2), round(plain[0], 2)],
        "x plain": round(fused[0] / plain[0], 3),
        "x plain, threads' seconds": round(fused[1] / plain[1], 3),
        "MiB": [round(figures[2] / MIB) for figures in (fused, plain)],
        "memory of plain": round(fused[2] / plain[2], 4),
        "load before and after": [round(load), round(os.getloadavg()[0])],
    }
    print(arguments.shape, arguments.name, report)
    if arguments.json:
        whole = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
        setting = {"T, H, V": SHAPES[arguments.shape], "threads": torch.get_num_threads(), "torch": torch.__version__}
        entry = whole.setdefault(arguments.shape, setting)
        entry[arguments.name] = report
        arguments.json.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
