"""What a process of its own tells of the accelerators."""

import pytest

from astar_megatron.run.local_accelerators import Accelerator, told_by


def test_accelerators_are_told_with_name_bytes_and_capability() -> None:
    program = "print('a library says hello'); print('[[\"H200\", 1000, 9, 0], [\"L4\", 300, 8, 9]]')"
    assert told_by(program) == (Accelerator("H200", 1000, 9.0), Accelerator("L4", 300, 8.9))


@pytest.mark.parametrize(
    ("program", "cause"),
    [
        ("raise RuntimeError('CUDA error: all devices are busy')", "CUDA error: all devices are busy"),
        ("import os; os._exit(7)", "status 7"),
    ],
)
def test_accelerators_that_can_not_be_asked_are_an_error_with_the_cause(program: str, cause: str) -> None:
    with pytest.raises(ValueError, match=f"^torch can't use the accelerators of this machine: .*{cause}.*nvidia-smi"):
        told_by(program)
