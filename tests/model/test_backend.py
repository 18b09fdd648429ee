"""What a device can't do is refused in words, before a rank is started."""

import pytest
import torch

pytest.importorskip("pydantic")
pytest.importorskip("yaml")

from astar_megatron.config import ModelConfig, OptimConfig
from astar_megatron.model import backend as backends
from astar_megatron.model.backend import Backend, check_features

CPU = Backend(name="cpu", collectives="gloo", uses_transformer_engine=False, has_triton=False, reason="no GPU")


@pytest.mark.parametrize(
    ("model", "optim", "num_gpus", "wanted"),
    [
        ({"fp8": "tensorwise"}, {}, 0, r"model\.fp8=tensorwise: .*there is no GPU; set model\.fp8=null"),
        ({"fp8": "mxfp8"}, {}, 1, r"model\.fp8=mxfp8: .*Transformer Engine is not installed"),
        ({"reference": "offload"}, {}, 0, r"model\.reference=offload: .*set model\.reference=resident"),
        ({}, {"offload": True}, 0, r"optim\.offload: .*there is no GPU; set optim\.offload=false"),
        ({}, {"offload": True}, 1, r"optim\.offload: .*Transformer Engine is not installed"),
    ],
)
def test_what_needs_another_device_is_refused_by_key(
    model: dict[str, str], optim: dict[str, bool], num_gpus: int, wanted: str
) -> None:
    if num_gpus and backends.uses_transformer_engine(num_gpus):
        pytest.skip("Transformer Engine is installed here")
    with pytest.raises(ValueError, match=wanted):
        check_features(ModelConfig(path="x", **model), OptimConfig(**optim), num_gpus)  # type: ignore[arg-type]


def test_what_every_device_does_is_let_through() -> None:
    check_features(ModelConfig(path="x"), OptimConfig(), num_gpus=0)
    check_features(ModelConfig(path="x", reference="offload"), OptimConfig(), num_gpus=1)


def test_a_cpu_states_no_peak_and_measures_its_process() -> None:
    assert CPU.peak_flops is None
    assert CPU.describe() == "no GPU; no MFU: the peak of this device is not known"
    held = CPU.peak_memory_bytes()
    block = torch.ones(held // 4 + (64 << 20))  # more than the process ever held
    assert CPU.peak_memory_bytes() >= block.nbytes
    with CPU.range("anything"):
        pass


@pytest.mark.parametrize(
    ("device", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GB200", 2500),
        ("NVIDIA H20", 148),
        ("Some other device", None),
    ],
)
def test_the_peak_of_a_device_is_found_by_its_name(device: str, tflops: float | None) -> None:
    assert backends.peak_flops_of(device) == (None if tflops is None else tflops * 1e12)
