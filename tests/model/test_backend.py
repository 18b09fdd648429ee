"""What a device can't do is refused in words, before a rank is started."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("pydantic")
pytest.importorskip("yaml")

from astar_megatron.config import ModelConfig, OptimConfig
from astar_megatron.model import backend as backends
from astar_megatron.model import gpus
from astar_megatron.model.backend import (
    Backend,
    check_features,
    check_float32,
    environment,
    product_error,
    unfused_attention,
)
from conversion.families import read_model
from conversion.tiles import ParallelLayout

ENGINE = Backend(name="cuda", uses_transformer_engine=True, has_triton=True, reason="a GPU")
CPU = Backend(name="cpu", uses_transformer_engine=False, has_triton=False, reason="no GPU")


@pytest.mark.parametrize(
    ("model", "optim", "num_gpus", "wanted"),
    [
        ({"fp8": "tensorwise"}, {}, 0, r"model\.fp8=tensorwise: .*there is no GPU; set model\.fp8=null"),
        ({"fp8": "mxfp8"}, {}, 1, r"model\.fp8=mxfp8: .*Transformer Engine is not installed"),
        ({"reference": "offload"}, {}, 0, r"model\.reference=offload: .*set model\.reference=resident"),
        ({}, {"offload": True}, 0, r"optim\.offload: .*there is no GPU; set optim\.offload=false"),
        ({}, {"offload": True}, 1, r"optim\.offload: .*Transformer Engine is not installed"),
        ({"dtype": "float32"}, {"offload": True}, 1, r"optim\.offload with model\.dtype=float32: .*=bfloat16, or"),
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


@pytest.mark.parametrize(
    ("capability", "recipes"),
    [
        (8.0, []),
        (8.6, []),
        (8.9, ["tensorwise"]),
        (9.0, ["tensorwise", "blockwise"]),
        (10.0, ["tensorwise", "blockwise", "mxfp8"]),
        (12.0, ["tensorwise", "blockwise"]),
    ],
)
def test_a_gpu_takes_the_recipes_of_fp8_that_transformer_engine_has_for_it(
    capability: float, recipes: list[str]
) -> None:
    every = ("tensorwise", "blockwise", "mxfp8")
    assert [recipe for recipe in every if not gpus.refused_fp8(recipe, capability)] == recipes
    assert gpus.refused_fp8(None, capability) == ""
    for recipe in {*every} - {*recipes}:
        instead = " or ".join([*recipes, "null"])
        wanted = rf"model\.fp8={recipe}: .* this GPU has {capability}; set model\.fp8={instead}$"
        with pytest.raises(ValueError, match=wanted):
            check_features(ModelConfig(path="x", fp8=recipe), OptimConfig(), 1, capability)  # type: ignore[arg-type]


def test_a_cpu_states_no_peak_and_measures_its_process() -> None:
    assert CPU.peak_flops is None
    assert CPU.describe() == "no GPU; no MFU: the peak of this device is not known"
    peak = CPU.peak_memory_bytes()
    block = torch.ones(peak // 4 + (64 << 20))  # more than the process ever held
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
    gpu = gpus.of_device(device)
    assert (gpu and gpu.peak_flops) == (None if tflops is None else tflops * 1e12)


def test_transformer_engine_gets_every_fusion_that_was_measured() -> None:
    """Without them a step took twice as long, and nothing said so."""
    assert ENGINE.transformer_options() == {
        "apply_rope_fusion": True,
        "bias_activation_fusion": True,
        "bias_dropout_fusion": True,
        "persist_layer_norm": True,
    }
    in_fp8 = ENGINE.transformer_options("tensorwise")
    assert in_fp8 == ENGINE.transformer_options() | {"fp8": "hybrid", "fp8_recipe": "tensorwise"}


def test_fusions_have_megatrons_names_and_none_is_on_without_transformer_engine() -> None:
    pytest.importorskip("megatron")
    backends.choose()  # megatron asks for it before it is imported
    from megatron.core.transformer import TransformerConfig

    fields = TransformerConfig.__dataclass_fields__
    assert fields.keys() >= ENGINE.transformer_options("tensorwise").keys() | CPU.transformer_options().keys()
    fused = {name for name in fields if "fus" in name and fields[name].default is True}
    assert not fused - {"mla_down_proj_fusion"}  # a new one that is on by itself would be news
    assert not any(value for name, value in CPU.transformer_options().items() if "fusion" in name)


def test_packs_without_a_fused_attention_kernel_are_told_with_the_reason() -> None:
    bfloat16 = torch.bfloat16
    assert unfused_attention(9.0, bfloat16, has_flash=False) == unfused_attention(8.6, bfloat16, has_flash=True) == ""
    assert "this GPU has 8.0, and flash-attn, which it takes else, is not" in unfused_attention(
        8.0, bfloat16, has_flash=False
    )
    assert "float32" in unfused_attention(9.0, torch.float32, has_flash=True)
    assert CPU.unfused_attention(torch.float32) == ""
    CPU.check(torch.float32, context=2, has_experts=True)


def test_a_gpus_experts_need_the_kernel_that_sums_in_order(tiny_family: Callable[..., Path], tied_llama: Path) -> None:
    pytest.importorskip("megatron")
    backends.choose()
    from astar_megatron.model.build import transformer_config

    class WithoutFusions(Backend):  # which megatron refuses first where Transformer Engine is not installed
        def transformer_options(self, fp8: str | None = None) -> dict[str, Any]:
            return CPU.transformer_options()

    engine = WithoutFusions(**dataclasses.asdict(ENGINE))
    own = dataclasses.replace(ENGINE, uses_transformer_engine=False)
    with pytest.raises(ValueError, match=r"model\.path: on a GPU a model with experts needs Transformer Engine"):
        own.check(torch.bfloat16, context=1, has_experts=True)
    layout, experts = ParallelLayout(), read_model(tiny_family("qwen3_moe"))
    assert not transformer_config(read_model(tied_llama), layout, torch.bfloat16, engine).moe_permute_fusion
    assert not transformer_config(experts, layout, torch.bfloat16, CPU).moe_permute_fusion
    if not backends.uses_transformer_engine(1):
        with pytest.raises(ValueError, match="fused permutation"):  # megatron looks for Transformer Engine's
            transformer_config(experts, layout, torch.bfloat16, engine)


def in_ten_bits(weight: torch.Tensor) -> torch.nn.Linear:
    """A linear layer that rounds its factors as TF32 does."""

    def rounded(tensor: torch.Tensor) -> torch.Tensor:
        mantissa, exponent = torch.frexp(tensor)
        return torch.ldexp((mantissa * 2**11).round() / 2**11, exponent)

    class Rounding(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return rounded(input) @ rounded(self.weight).t()

    linear = Rounding(weight.size(1), weight.size(0), bias=False)
    linear.weight.data = weight
    return linear


def test_float32_that_is_multiplied_in_ten_bits_is_refused() -> None:
    linear = torch.nn.Linear(512, 64, bias=False)
    exact = product_error(linear, linear.weight.detach())
    assert exact < 1e-6
    check_float32(exact)
    short = product_error(in_ten_bits(linear.weight.detach()), linear.weight.detach())
    assert 1e-4 < short < 1e-3
    with pytest.raises(ValueError, match=r"^model\.dtype=float32: .*as TF32.*set model\.dtype=bfloat16"):
        check_float32(short)


def test_ranks_in_float32_are_started_without_tf32() -> None:
    common = {"threads": 1, "num_nodes": 1}
    assert environment(gpus=["0"], dtype="float32", **common)["NVIDIA_TF32_OVERRIDE"] == "0"
    assert "NVIDIA_TF32_OVERRIDE" not in environment(gpus=["0"], dtype="bfloat16", **common)
    assert "NVIDIA_TF32_OVERRIDE" not in environment(gpus=[], dtype="float32", **common)


def test_sums_over_ranks_on_gpus_have_a_fixed_order() -> None:
    common = {"threads": 1, "num_nodes": 1, "dtype": "bfloat16"}
    assert environment(gpus=["0"], **common)["NCCL_NVLS_ENABLE"] == "0"


@pytest.mark.parametrize("gpus", [[], ["0"]])
def test_a_rank_is_not_bound_to_a_core_by_the_environment_of_its_node(gpus: list[str]) -> None:
    assert environment(gpus=gpus, threads=1, num_nodes=1, dtype="bfloat16")["OMP_PROC_BIND"] == "false"


def test_a_rank_that_shares_its_gpu_may_take_its_share_and_no_more() -> None:
    common = {"threads": 1, "num_nodes": 1, "gpus": ["3"], "dtype": "bfloat16"}
    assert "per_process_memory_fraction:0.4750" in environment(**common, memory_share=0.475)["PYTORCH_CUDA_ALLOC_CONF"]
    assert "per_process_memory_fraction" not in environment(**common)["PYTORCH_CUDA_ALLOC_CONF"]


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_a_users_settings_of_the_allocator_stay_but_for_segments_that_no_engine_can_open(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = "roundup_power2_divisions:[256:1,512:2,>:4],per_process_memory_fraction:0.9"
    monkeypatch.setenv(name, f"expandable_segments:True,{own},backend:cudaMallocAsync,")
    known = environment(gpus=["3"], threads=1, num_nodes=1, dtype="bfloat16", memory_share=0.5)
    assert known["PYTORCH_CUDA_ALLOC_CONF"] == known["PYTORCH_ALLOC_CONF"]  # torch reads now one, now the other
    assert known["PYTORCH_ALLOC_CONF"] == (
        "roundup_power2_divisions:[256:1,512:2,>:4],"
        "pinned_max_round_threshold_mb:1,pinned_max_cached_size_mb:1,per_process_memory_fraction:0.5000"
    )
    monkeypatch.delenv(name)  # torch itself reads it when it is first asked
    torch._C._accelerator_setAllocatorSettings(known["PYTORCH_ALLOC_CONF"])  # raises for a key that torch does not know
