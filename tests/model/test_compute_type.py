"""There is one rule for the type that is computed in: ranks, engines, plans, checks and the doctor have the same."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pydantic")
pytest.importorskip("yaml")
from samples import run_config

from astar_megatron import plan
from astar_megatron.config import Dtype
from astar_megatron.model import compute_type as types
from astar_megatron.model.compute_type import compute_type, native_bfloat16
from astar_megatron.run import accelerators, resources
from astar_megatron.run.resources import GIB, Machine, ResourceError
from conversion.families import read_model

NUM_PARAMETERS = 1000
NO_GPU = Machine(memory_bytes=64 * GIB, shared_bytes=8 * GIB, num_accelerators=0)


@pytest.mark.parametrize(
    ("line", "native"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16 sse2", ["avx512_bf16"]),
        ("flags\t\t: avx512_bf16 amx_tile amx_bf16", ["amx_bf16", "avx512_bf16"]),
        ("flags\t\t: fpu avx2 avx512f", []),
        ("Features\t: fp asimd bf16", []),  # of ARM, for which nothing here is made
        ("", []),
    ],
)
def test_native_bfloat16_is_read_from_the_kernels_flags(tmp_path: Path, line: str, native: list[str]) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(f"processor\t: 0\nmodel name\t: some bf16 CPU\n{line}\n", encoding="utf-8")
    assert native_bfloat16(tmp_path) == native
    assert native_bfloat16(tmp_path / "without") == []


@pytest.fixture(params=[[], ["avx512_bf16"]], ids=["emulated", "native"])
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The instructions of the CPU of a machine without a GPU."""
    monkeypatch.setattr(types, "native_bfloat16", lambda: request.param)
    monkeypatch.setattr(resources, "measure", lambda: NO_GPU)
    return request.param


@pytest.mark.parametrize("num_gpus", [0, 8])
def test_a_named_type_wins_and_auto_is_what_the_device_multiplies(native: list[str], num_gpus: int) -> None:
    names: tuple[Dtype, ...] = ("bfloat16", "float32")
    for name in names:
        assert compute_type(name, num_gpus)[0] == name
    assert compute_type("auto", num_gpus)[0] == ("bfloat16" if native or num_gpus else "float32")


def test_without_a_gpu_memory_and_disk_are_planned_for_what_ranks_compute_in(
    native: list[str], tied_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dtype, _ = compute_type("auto", 0)
    lengths = {"data": {"max_prompt_tokens": 32}, "sampling": {"max_response_tokens": 64}}
    sections: dict[str, Any] = lengths | {"run_dir": str(tmp_path), "checkpoint": {"keep": 3}}
    automatic, named = (
        run_config(model={"path": str(tied_llama), "dtype": name}, **sections) for name in ("auto", dtype)
    )
    model = read_model(tied_llama)
    assert resources.needs(automatic, model, NO_GPU) == resources.needs(named, model, NO_GPU)

    written = (4 * 14 + 2 if native else 4 * 16 + 4) * NUM_PARAMETERS
    resources.check_disk(automatic, NUM_PARAMETERS, free=written)
    with pytest.raises(ResourceError, match=r"^run_dir="):
        resources.check_disk(automatic, NUM_PARAMETERS, free=written - 1)

    plans = []
    for cfg in (automatic, named):
        plan.main(cfg, None, as_json=True)
        plans.append(json.loads(capsys.readouterr().out))
    assert plans[0] == plans[1]


def test_numbers_on_gpus_have_the_bytes_of_the_type_that_ranks_compute_in(native: list[str]) -> None:
    names: tuple[Dtype, ...] = ("auto", "bfloat16", "float32")
    for name in names:
        size = {"bfloat16": 2, "float32": 4}[compute_type(name, num_gpus=1)[0]]
        assert accelerators.number_bytes(run_config(model={"dtype": name})) == size
