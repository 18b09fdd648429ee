"""Every implementation of the LM head computes what float64 does, and keeps no more logits than it may."""

import dataclasses
import weakref
from typing import Any

import pytest
import torch
from head_cases import BETA2, CASES, FLOAT32, Case, assert_close, errors, make, scoring_gap
from torch.utils._python_dispatch import TorchDispatchMode

from astar_megatron.model.head.fused import groups
from astar_megatron.model.head.interface import Responses, Vocabulary, sequence_sums

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("head", ["plain", "chunked"])
def test_log_probs_and_both_gradients_equal_float64(head: str, case: Case) -> None:
    assert_close(errors(head, case), case)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_scoring_gives_bitwise_what_the_loss_is_given(case: Case) -> None:
    assert scoring_gap("chunked", case) == 0.0


def test_scoring_gives_bitwise_what_the_loss_is_given_by_the_triton_kernels(interpreted: Any) -> None:
    assert interpreted(scoring_gap, "triton", Case()) == 0.0


def test_chunked_sums_bfloat16_in_float32() -> None:
    case = Case(dtype=torch.bfloat16, kept_rows=20)
    assert_close(errors("chunked", case), case)
    assert errors("plain", case)["logprobs"] > 100 * FLOAT32  # logits rounded to bfloat16 would show


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_triton_kernels_equal_float64_in_the_interpreter(case: Case, interpreted: Any) -> None:
    case = dataclasses.replace(case, columns=min(case.columns, 320), size=min(case.size, 319))  # it takes seconds
    assert_close(interpreted(errors, "triton", case), case)


def test_triton_kernels_sum_16_bits_in_float32_in_the_interpreter(interpreted: Any) -> None:
    """float16 stands for bfloat16, which the interpreter takes for integers; a GPU test has the real one."""
    case = Case(dtype=torch.float16, kept_rows=20, columns=600, size=577)
    assert_close(interpreted(errors, "triton", case), case)


def test_triton_refuses_rows_that_are_no_multiple_of_16_bytes(interpreted: Any) -> None:
    with pytest.raises(ValueError, match="expected a hidden size that fills a multiple of 16 bytes, got 46"):
        interpreted(errors, "triton", Case(hidden=46))


class _Memory(TorchDispatchMode):
    """Notes the most bytes that results of operations, still held by anyone, ever took together."""

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._seen: list[weakref.ref[torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        results = result if isinstance(result, tuple | list) else [result]
        self._seen += [weakref.ref(tensor) for tensor in results if isinstance(tensor, torch.Tensor)]
        self._seen = [seen for seen in self._seen if seen() is not None]
        storages = {
            tensor.untyped_storage().data_ptr(): tensor for seen in self._seen if (tensor := seen()) is not None
        }
        self.peak_bytes = max(self.peak_bytes, sum(t.untyped_storage().nbytes() for t in storages.values()))
        return result


def _peak_bytes(head: str, case: Case) -> int:
    hidden = torch.randn(sum(case.lengths), case.hidden, requires_grad=True)
    weight = torch.randn(case.columns, case.hidden, requires_grad=True)
    responses = Responses(targets=torch.zeros(len(hidden), dtype=torch.int64), lengths=case.lengths)
    inputs: tuple[Any, Any, Any, Any] = hidden, weight, responses, Vocabulary(size=case.size)
    with _Memory() as memory:
        make(head, case).sequence_loss(*inputs, lambda _, logprobs: logprobs.sum()[None].square()).backward()
    return memory.peak_bytes - 2 * 4 * weight.numel()  # its gradient, and a copy on the way to .grad


def test_no_more_logits_exist_than_the_memory_holds() -> None:
    """Of several groups of sequences one at a time, and of a sequence too long for that one tile at a time."""
    case = Case(lengths=(18, 17, 90, 19, 16), hidden=6, columns=4999, size=4999, kept_rows=20)
    assert _peak_bytes("plain", case) > 4 * sum(case.lengths) * case.columns
    assert _peak_bytes("chunked", case) < 1.3 * 4 * case.kept_rows * case.columns


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(0, 12))
def test_groups_take_every_sequence_once_and_hold_what_fits(lengths: list[int], rows: int) -> None:
    all_groups = list(groups(tuple(lengths), rows))
    sequences = [index for group in all_groups for index in range(len(lengths))[group.sequences]]
    positions = [row for group in all_groups for row in range(sum(lengths))[group.rows]]
    assert sequences == list(range(len(lengths)))
    assert positions == list(range(sum(lengths)))
    for group in all_groups:
        own = lengths[group.sequences]
        assert sum(own) == group.rows.stop - group.rows.start
        assert group.fits == (sum(own) <= rows)
        assert group.fits or len(own) == 1


def test_the_loss_is_asked_for_every_sequence_once_and_its_slope_reaches_the_gradient() -> None:
    case = Case()
    hidden, weight = torch.randn(sum(case.lengths), case.hidden), torch.randn(case.columns, case.hidden)
    responses = Responses(targets=torch.zeros(len(hidden), dtype=torch.int64), lengths=case.lengths)
    asked: list[int] = []

    def only_sequence_3(sequences: slice, logprobs: torch.Tensor) -> torch.Tensor:
        indices = range(len(case.lengths))[sequences]
        asked.extend(indices)
        sums = sequence_sums(logprobs, case.lengths[sequences])
        return BETA2 * sums * torch.tensor([float(index == 3) for index in indices])

    hidden.requires_grad_()
    loss = make("chunked", case).sequence_loss(hidden, weight, responses, Vocabulary(size=case.size), only_sequence_3)
    loss.backward(retain_graph=True)
    assert asked == list(range(len(case.lengths)))
    moved = hidden.grad.abs().sum(1).nonzero().squeeze(1).tolist()  # type: ignore[union-attr]
    assert moved == list(range(sum(case.lengths[:3]), sum(case.lengths[:4])))
    with pytest.raises(AssertionError, match="given once"):
        loss.backward()


def test_what_does_not_belong_together_is_refused() -> None:
    head, vocabulary = make("chunked", Case()), Vocabulary(size=11)
    responses = Responses(targets=torch.tensor([1, 2, 3]), lengths=(2, 1))
    with pytest.raises(ValueError, match=r"expected hidden states \(3, 5\) of torch.float32"):
        head.token_logprobs(torch.ones(4, 5), torch.ones(11, 5), responses, vocabulary)
    with pytest.raises(ValueError, match=r"got \(3, 5\) of torch.bfloat16"):
        head.token_logprobs(torch.ones(3, 5, dtype=torch.bfloat16), torch.ones(11, 5), responses, vocabulary)
    with pytest.raises(ValueError, match="temperature above 0, got 0"):
        cold = dataclasses.replace(vocabulary, temperature=0.0)
        head.token_logprobs(torch.ones(3, 5), torch.ones(11, 5), responses, cold)


def test_ranks_that_share_sequences_take_the_same_ones_at_a_time() -> None:
    """Each loss is summed over them: where one rank has few rows and another many, both must ask for the same."""
    ranks = [(5, 0, 2, 7, 1), (1, 6, 2, 0, 0)]
    most = tuple(max(lengths) for lengths in zip(*ranks, strict=True))
    assert [g.sequences for g in groups(ranks[0], 7)] != [g.sequences for g in groups(ranks[1], 7)]
    of_ranks = [list(groups(lengths, 7, most)) for lengths in ranks]
    assert [g.sequences for g in of_ranks[0]] == [g.sequences for g in of_ranks[1]]
    for lengths, parts in zip(ranks, of_ranks, strict=True):
        assert [g.rows.stop - g.rows.start for g in parts] == [sum(lengths[g.sequences]) for g in parts]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_triton_kernels_compile_without_a_gpu(dtype: str, keep: bool) -> None:
    """For compute capability 9.0, to machine code; the interpreter accepts more than the compiler does."""
    pytest.importorskip("triton", reason="triton is not installed: its kernels can't be compiled")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from astar_megatron.model.head import triton_kernels

    rows, columns, inner, warps, stages = triton_kernels._BLOCKS[{"bf16": 2, "fp32": 4}[dtype]]
    constants: dict[str, Any] = {"ROWS": rows, "COLUMNS": columns, "INNER": inner, "BAND": 16, "KEEP": keep}
    constants |= {"PRECISION": "ieee" if dtype == "fp32" else "tf32"}
    types = dict.fromkeys(["maxima", "totals", "target_logits"], "*fp32")
    types |= {"hidden": f"tensordesc<{dtype}[{rows},{inner}]>", "weight": f"tensordesc<{dtype}[{columns},{inner}]>"}
    types |= {"targets": "*i64", "kept": f"*{dtype}", "scale": "fp32"}
    types |= dict.fromkeys(["kept_stride", "r", "v", "depth"], "i32") | dict.fromkeys(constants, "constexpr")
    kernel: Any = triton_kernels._sums_kernel
    signature = {name: types[name] for name in kernel.arg_names}
    options = {"num_warps": warps, "num_stages": stages}
    done = compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32), options=options)
    assert ("wgmma" in done.asm["ptx"]) == (dtype == "bf16")  # the matrix units
    assert done.metadata.shared <= 227 << 10  # bytes a block may have there
