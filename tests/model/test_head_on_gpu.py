"""What a GPU alone can show of the head: its kernels compiled. torch and Triton are enough."""

import dataclasses

import pytest
import torch
from head_cases import CASES, Case, assert_close, errors, scoring_gap

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch sees none"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_triton_head_equals_float64(case: Case, dtype: torch.dtype) -> None:
    case = dataclasses.replace(case, dtype=dtype)
    assert_close(errors("triton", case, "cuda"), case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_head_equals_float64_on_the_gpu(dtype: torch.dtype) -> None:
    case = Case(dtype=dtype, columns=264)
    assert_close(errors("chunked", case, "cuda"), case)


def test_scoring_and_training_agree_bitwise_at_the_sizes_of_a_model() -> None:
    """The kernel that keeps its exponentials and the one that does not are compiled apart."""
    for dtype in (torch.bfloat16, torch.float32):
        case = Case(lengths=(700, 31, 90, 1200), hidden=1536, columns=151936, size=151936, dtype=dtype, kept_rows=800)
        assert scoring_gap("triton", case, "cuda") == 0.0


@pytest.mark.parametrize("package", ["transformer_engine", "vllm", "ray"])
def test_packages_of_the_whole_lane_import(package: str) -> None:
    """The rest of the lane for CUDA; what is missing here is named in the summary of skipped tests."""
    pytest.importorskip(package)
