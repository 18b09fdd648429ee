"""Environment variables that vLLM could not read do not reach it, and are named."""

import pytest
from samples import output_of

pytest.importorskip("vllm")

PROGRAM = """
import os, sys
from astar_megatron.rollout.engine import leave_out_unreadable
print(*leave_out_unreadable(), sep="\\n")
print("vllm" in sys.modules, sorted(name for name in os.environ if name in ("VLLM_PORT", "VERBOSE", "VLLM_HOST_IP")))
"""


def left_out(**variables: str) -> list[str]:
    return output_of(PROGRAM, **variables).splitlines()


def test_what_kubernetes_sets_beside_a_service_named_vllm_is_left_out() -> None:
    *names, rest = left_out(VLLM_PORT="tcp://10.0.0.7:8000", VERBOSE="yes", VLLM_HOST_IP="127.0.0.1")
    assert [name.partition(", which vLLM can't read: ")[0] for name in names] == [
        "VERBOSE='yes'",
        "VLLM_PORT='tcp://10.0.0.7:8000'",
    ]
    assert rest == "False ['VLLM_HOST_IP']"


def test_variables_of_the_right_type_stay() -> None:
    assert left_out(VLLM_PORT="8000", VERBOSE="1") == ["", "False ['VERBOSE', 'VLLM_PORT']"]
