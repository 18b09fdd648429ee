"""The LM head on one GPU: time, rate, memory and error of each implementation beside the bare matrix products.

    PYTHONPATH=. python3 tests/benchmarks/gpu_head.py [--json FILE]        (about one minute)

16 sequences of 512 tokens, hidden size 4096, vocabulary 131072, bfloat16. `score` is the pass without gradients;
`at once` is the way to the loss and both gradients (model/head/fused.py), measured forward and backward together;
`autograd` is the plain head's. Rates count the products that a pass needs: 1 for a score, 3 with gradients; "x bare" is
the time over that of the same products alone, and "back" that of all but a score, over the products but one. Memory is
the peak beside hidden states, weight and their gradients. Errors are norms relative to float64.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_machine
import torch
import triton
from torch import Tensor

from astar_megatron.model.head.chunked import TorchKernels
from astar_megatron.model.head.fused import FusedHead
from astar_megatron.model.head.interface import Responses, Vocabulary, sequence_sums
from astar_megatron.model.head.triton_kernels import TritonKernels

sys.path.append(str(Path(__file__).resolve().parents[1] / "model"))
from plain_head import PlainHead  # where the tests of the head have it

LENGTHS, HIDDEN, COLUMNS = (512,) * 16, 4096, 131072
ROWS = sum(LENGTHS)
PRODUCT = 2 * ROWS * HIDDEN * COLUMNS  # operations of one
GIB = 1 << 30


class Inputs:
    def __init__(self) -> None:
        torch.manual_seed(0)
        self.hidden = torch.randn(ROWS, HIDDEN, device="cuda").bfloat16().requires_grad_()
        self.weight = (0.03 * torch.randn(COLUMNS, HIDDEN, device="cuda")).bfloat16().requires_grad_()
        targets = torch.randint(COLUMNS, (ROWS,), device="cuda")
        self.responses = Responses(targets=targets, lengths=LENGTHS)
        self.vocabulary = Vocabulary(size=COLUMNS)
        self.advantage = torch.randn(len(LENGTHS), device="cuda")

    def loss(self, sequences: slice, logprobs: Tensor) -> Tensor:
        sums = sequence_sums(logprobs, LENGTHS[sequences])
        return (1e-3 * sums - self.advantage[sequences]).square()

    @property
    def arguments(self) -> tuple[Any, Any, Any, Any]:
        return self.hidden, self.weight, self.responses, self.vocabulary

    def score(self, head: Any) -> Tensor:
        with torch.no_grad():
            return head.token_logprobs(*self.arguments)

    def at_once(self, head: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(head.sequence_loss(*self.arguments, self.loss), (self.hidden, self.weight))

    def autograd(self, head: PlainHead) -> tuple[Tensor, ...]:
        loss = self.loss(slice(0, len(LENGTHS)), head.token_logprobs(*self.arguments)).sum()
        return torch.autograd.grad(loss, (self.hidden, self.weight))

    @torch.no_grad()
    def exact(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-probs and both gradients in float64."""
        weight = self.weight.double()
        logprobs, normalisers = [], []
        for rows in range(0, ROWS, 1024):
            logits = self.hidden[rows : rows + 1024].double() @ weight.t()
            normalisers.append(logits.logsumexp(1))
            target = self.responses.targets[rows : rows + 1024, None]
            logprobs.append(logits.gather(1, target).squeeze(1) - normalisers[-1])
        sums = torch.stack([part.sum() for part in torch.cat(logprobs).split(LENGTHS)])
        slopes = 2e-3 * (1e-3 * sums - self.advantage.double())
        hidden, weights = [], torch.zeros_like(weight)
        for index, rows in enumerate(range(0, ROWS, 1024)):
            part = self.hidden[rows : rows + 1024].double()
            logits = (part @ weight.t()).sub_(normalisers[index][:, None]).exp_().neg_()
            logits.scatter_add_(1, self.responses.targets[rows : rows + 1024, None], torch.ones_like(logits[:, :1]))
            logits.mul_(slopes.repeat_interleave(512)[rows : rows + 1024, None])
            hidden.append(logits @ weight)
            weights.addmm_(logits.t(), part)
        return torch.cat(logprobs), torch.cat(hidden), weights


def measure(call: Callable[[], Any], gradients: int) -> tuple[float, float]:
    """Return the median milliseconds, and GiB at the peak beside what was there and the gradients' bytes."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before - gradients
    time: Any = triton.testing.do_bench(call, warmup=200, rep=1500, return_mode="median")
    return time, peak / GIB


def bare(inputs: Inputs) -> dict[str, float]:
    """Return milliseconds of the three products alone, each over all rows at once, bfloat16 in and out."""
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    logits = hidden @ weight.t()
    times = {
        "forward": measure(lambda: torch.mm(hidden, weight.t(), out=logits), 0)[0],
        "hidden": measure(lambda: torch.mm(logits, weight), 0)[0],
        "weight": measure(lambda: torch.mm(logits.t(), hidden), 0)[0],
    }
    return {name: round(time, 2) for name, time in times.items()}


def errors(computed: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> list[float]:
    return [float(f"{(a.double() - b).norm() / b.norm():.1e}") for a, b in zip(computed, wanted, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if (problem := gpu_machine.problem()) is not None:
        sys.exit(problem)
    inputs = Inputs()
    products = bare(inputs)
    once = sum(products.values())
    ideal = {"score": products["forward"], "autograd": once, "at once": once}
    count = {"score": 1, "autograd": 3, "at once": 3}
    exact = inputs.exact()
    rows, score = [], 0.0
    for name, head in {
        "plain": PlainHead(),
        "chunked": FusedHead(TorchKernels()),
        "triton": FusedHead(TritonKernels()),
    }.items():
        logprob_error = errors((inputs.score(head),), exact[:1])[0]
        passes: dict[str, Any] = {"score": inputs.score, "at once": inputs.at_once}
        if name == "plain":
            passes = {"score": inputs.score, "autograd": inputs.autograd}
        for kind, run in passes.items():
            gradients = 0 if kind == "score" else 2 * (inputs.hidden.numel() + inputs.weight.numel())
            time, memory = measure(lambda run=run, head=head: run(head), gradients)
            hidden_error, weight_error = errors(run(head), exact[1:]) if gradients else (None, None)
            score = time if kind == "score" else score
            back = (time - score) / (ideal[kind] - products["forward"]) if gradients else None
            rows.append(
                {
                    "head": name,
                    "pass": kind,
                    "ms": round(time, 2),
                    "x bare": round(time / ideal[kind], 3),
                    "back x bare": back and round(back, 3),
                    "TFLOP/s": round(count[kind] * PRODUCT / time / 1e9),
                    "GiB": round(memory, 2),
                    "log-prob error": logprob_error,
                    "hidden error": hidden_error,
                    "weight error": weight_error,
                }
            )
            torch.cuda.empty_cache()
    report = {
        "device": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "shape": {"T": ROWS, "H": HIDDEN, "V": COLUMNS, "dtype": "bfloat16"},
        "bare products, ms": products,
        "passes": rows,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{report['device']}, torch {torch.__version__}, triton {triton.__version__}; bare products, ms: {products}")
    for row in rows:
        print("  ".join(f"{name} {figure}" for name, figure in row.items()))


if __name__ == "__main__":
    main()
