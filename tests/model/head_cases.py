"""Cases of the LM head, and how far a head is from float64 in each. Runs in any process and on any device."""

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from plain_head import PlainHead
from torch import Tensor
from torch.distributed import ProcessGroup

from astar_megatron.model.head.chunked import TorchKernels
from astar_megatron.model.head.fused import FusedHead
from astar_megatron.model.head.interface import Head, Responses, Vocabulary

BETA2 = 0.05


@dataclass(frozen=True, kw_only=True)
class Case:
    """A pack of random hidden states. `kept_rows` is the memory: how many rows of logits may exist."""

    lengths: tuple[int, ...] = (7, 12, 3, 19, 0, 5)
    hidden: int = 48
    columns: int = 263  # of all ranks together, padding included
    size: int = 263
    temperature: float = 1.0
    dtype: torch.dtype = torch.float32
    kept_rows: int = 15


CASES = {
    "some sequences kept, some made again": Case(),
    "all kept": Case(kept_rows=500),
    "none kept": Case(kept_rows=1),
    "temperature": Case(temperature=0.7, columns=264, size=264),
    "padded vocabulary": Case(columns=320, size=263, hidden=80, temperature=1.3),
    "several tiles wide": Case(columns=5003, size=5001, lengths=(9, 4, 30), kept_rows=14),
    "no token": Case(lengths=(0, 0)),
    "one token": Case(lengths=(1,)),
}
# Of float64's norm. Sums and products are in float32 for every input type; bfloat16 and float16 gradients are rounded.
FLOAT32 = 2e-6
GRADIENT = {torch.float32: FLOAT32, torch.bfloat16: 5e-3, torch.float16: 1e-3}


def assert_close(distances: dict[str, float], case: Case) -> None:
    for name, error in distances.items():
        limit = GRADIENT[case.dtype] if name.endswith(("hidden", "weight")) else FLOAT32
        if name.startswith("ratio"):  # the exp of a log-prob has the log-prob's error, however small the ratio
            limit *= 2
        assert error <= limit, f"{name}: {error} of float64's norm, {limit} allowed"


def make(name: str, case: Case, num_ranks: int = 1) -> Head:
    if name == "plain":
        return PlainHead()
    columns = case.columns // num_ranks
    if name == "chunked":
        return FusedHead(TorchKernels(4 * columns * case.kept_rows))
    module = importlib.import_module("astar_megatron.model.head.triton_kernels")
    return FusedHead(module.TritonKernels(case.dtype.itemsize * columns * case.kept_rows))


def errors(
    name: str, case: Case, device: str = "cpu", rank: int = 0, num_ranks: int = 1, group: ProcessGroup | None = None
) -> dict[str, float]:
    """Return |found - float64| / |float64| of everything a head computes, by this rank's part of the weight."""
    inputs = _Inputs(case, torch.device(device), rank, num_ranks, group)
    head = make(name, case, num_ranks)
    wanted, computed = inputs.expected(), inputs.computed(head)
    assert wanted.keys() == computed.keys()
    for key, tensor in computed.items():
        assert tensor.shape == wanted[key].shape, key
    return {key: _distance(tensor, wanted[key]) for key, tensor in computed.items()}


def scoring_gap(
    name: str, case: Case, device: str = "cpu", rank: int = 0, num_ranks: int = 1, group: ProcessGroup | None = None
) -> float:
    """Return the summed difference between log-probs as scored without gradients and as the loss is given it."""
    inputs = _Inputs(case, torch.device(device), rank, num_ranks, group)
    return inputs.gap(make(name, case, num_ranks))


def _distance(computed: Tensor, wanted: Tensor) -> float:
    scale = wanted.norm().item()
    return (computed.double().cpu() - wanted).norm().item() / (scale if scale else 1.0)


class _Inputs:
    def __init__(self, case: Case, device: torch.device, rank: int, num_ranks: int, group: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        rows, columns = sum(case.lengths), case.columns // num_ranks
        self.case, self.mine = case, slice(rank * columns, (rank + 1) * columns)
        self.hidden = torch.randn(rows, case.hidden, generator=generator).to(case.dtype)
        self.weight = (0.5 * torch.randn(case.columns, case.hidden, generator=generator)).to(case.dtype)
        self.targets = torch.randint(case.size, (rows,), generator=generator)
        self.reference = torch.randn(len(case.lengths), generator=generator).mul(9)
        self.advantage = torch.randn(len(case.lengths), generator=generator)
        with torch.no_grad():  # near the head's own, so that some ratios are clipped and some are not
            near = self._logprobs64(self.hidden.double(), self.weight.double())
            self.old_logprobs = near + 0.3 * torch.randn(rows, generator=generator)
        self.responses = Responses(targets=self.targets.to(device), lengths=case.lengths)
        self.vocabulary = Vocabulary(
            size=case.size, temperature=case.temperature, first_column=self.mine.start, group=group
        )
        self.device = device

    def _logprobs64(self, hidden: Tensor, weight: Tensor) -> Tensor:
        table = (hidden @ weight[: self.case.size].t() / self.case.temperature).log_softmax(1)
        return table[torch.arange(len(hidden)), self.targets]

    def leaves(self) -> tuple[Tensor, Tensor]:
        # A copy: the slice alone keeps the whole weight's storage, and the heads must not read past their part.
        parts = self.hidden, self.weight[self.mine]
        hidden, weight = (part.clone().to(self.device).requires_grad_() for part in parts)
        return hidden, weight

    def loss(self, sequences: slice, logprobs: Tensor) -> Tensor:
        """A*PO's: of the sums."""
        sums = torch.stack([part.double().sum() for part in logprobs.split(self.case.lengths[sequences])]).to(logprobs)
        reference, advantage = (x[sequences].to(sums) for x in (self.reference, self.advantage))
        return (BETA2 * (sums - reference) - advantage).square() / 7

    def ratio_loss(self, sequences: slice, logprobs: Tensor) -> Tensor:
        """Of the ratio of each token to a log-prob beside its own, clipped: a slope for each token, many of them 0."""
        lengths = self.case.lengths[sequences]
        first = sum(self.case.lengths[: sequences.start])
        old = self.old_logprobs[first : first + sum(lengths)].to(logprobs)
        advantage = self.advantage[sequences].to(logprobs).repeat_interleave(torch.tensor(lengths).to(logprobs.device))
        ratio = (logprobs - old).exp()
        token_losses = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        return torch.stack([part.sum() for part in token_losses.split(lengths)])

    def expected(self) -> dict[str, Tensor]:
        """By the formulas, in float64, on one CPU."""
        hidden, weight = self.hidden.double().requires_grad_(), self.weight.double().requires_grad_()
        logprobs = self._logprobs64(hidden, weight)
        everything = slice(0, len(self.case.lengths))
        loss = self.loss(everything, logprobs).sum()
        sequence = torch.autograd.grad(3 * loss, (hidden, weight), retain_graph=True)
        ratio = torch.autograd.grad(self.ratio_loss(everything, logprobs).sum(), (hidden, weight))
        tensors = self._named(logprobs, loss, sequence, ratio)
        return {name: tensor[self.mine] if "weight" in name else tensor for name, tensor in tensors.items()}

    def computed(self, head: Head) -> dict[str, Tensor]:
        hidden, weight = self.leaves()
        inputs: tuple[Any, Any, Any, Any] = hidden, weight, self.responses, self.vocabulary
        logprobs = head.token_logprobs(*inputs)
        loss = head.sequence_loss(*inputs, self.loss)
        sequence = torch.autograd.grad(3 * loss, (hidden, weight))
        ratio = torch.autograd.grad(head.sequence_loss(*inputs, self.ratio_loss), (hidden, weight))
        return self._named(logprobs, loss, sequence, ratio)

    def gap(self, head: Head) -> float:
        seen: list[Tensor] = []

        def remember(sequences: slice, logprobs: Tensor) -> Tensor:
            seen.append(logprobs.detach())
            return self.loss(sequences, logprobs)

        hidden, weight = self.leaves()
        head.sequence_loss(hidden, weight, self.responses, self.vocabulary, remember)
        scores = head.token_logprobs(hidden, weight, self.responses, self.vocabulary)
        return float((torch.cat(seen) - scores).abs().sum())

    @staticmethod
    def _named(logprobs: Tensor, loss: Tensor, sequence: Any, ratio: Any) -> dict[str, Tensor]:
        return {
            "logprobs": logprobs.detach(),
            "loss": loss.detach(),
            "sequence hidden": sequence[0],
            "sequence weight": sequence[1],
            "ratio hidden": ratio[0],
            "ratio weight": ratio[1],
        }
