"""THE switch: CPU (gloo, megatron's local layers) or CUDA (nccl, Transformer Engine), with the reason in words.

Everything that depends on the device and is not the engine's is decided here once a process; other code asks a Backend.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch

from astar_megatron.model import cpu_shim


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """What a Megatron rank runs on.

    `shares_prefix`: the attention can keep a prefix that all sequences of a pack share once (model/attention.py).
    """

    name: Literal["cpu", "cuda"]
    collectives: Literal["gloo", "nccl"]
    reason: str

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.name == "cpu" else torch.device("cuda", torch.cuda.current_device())

    @property
    def shares_prefix(self) -> bool:
        return self.name == "cpu"

    @property
    def uses_transformer_engine(self) -> bool:
        return self.name == "cuda"

    def transformer_options(self) -> dict[str, Any]:
        """Return TransformerConfig options that this device needs, none of which changes the model."""
        if self.name == "cuda":
            return {}
        return {
            "use_cpu_initialization": True,
            "gradient_accumulation_fusion": False,
            "masked_softmax_fusion": False,
            "bias_dropout_fusion": False,
            "bias_activation_fusion": False,
            "apply_rope_fusion": False,
            "persist_layer_norm": False,
        }


@cache
def choose() -> Backend:
    """Return this process's backend; on a machine without CUDA it also makes megatron-core run there.

    Call in the thread that builds and runs the model, before megatron is imported elsewhere in it.
    """
    if torch.cuda.is_available():
        torch.cuda.set_device(0)  # Ray shows a rank only its own GPU
        return Backend(name="cuda", collectives="nccl", reason=f"CUDA device {torch.cuda.get_device_name(0)}")
    cpu_shim.install()
    return Backend(name="cpu", collectives="gloo", reason=f"torch {torch.__version__} sees no CUDA device")


def environment(*, num_gpus: int, threads: int, num_nodes: int) -> dict[str, str]:
    """Return the environment variables that a rank needs before it imports torch."""
    common = {"PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    if num_gpus:
        return common | {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    common |= {
        # Threads that spin while the engine computes slow both three-fold.
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "0",
        "TORCHDYNAMO_DISABLE": "1",  # compiling takes longer than the work it would save
    }
    return common | ({"GLOO_SOCKET_IFNAME": "lo"} if num_nodes == 1 else {})


def resolve_dtype(name: Literal["auto", "bfloat16", "float32"], num_gpus: int) -> tuple[torch.dtype, str]:
    """Return the compute type of policy, reference and engines, with the reason in words.

    `auto` is bfloat16 on GPUs and on CPUs whose matrix units take it (AVX512_BF16, AMX); emulated bfloat16 is ten
    times slower than float32, so other CPUs compute in float32.
    """
    if name != "auto":
        return getattr(torch, name), f"{name}: asked for by model.dtype"
    if num_gpus:
        return torch.bfloat16, "bfloat16: the cluster has GPUs"
    capabilities = torch.cpu.get_capabilities()
    if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"):
        return torch.bfloat16, "bfloat16: this CPU multiplies it natively"
    return torch.float32, "float32: this CPU has no native bfloat16 (AVX512_BF16 or AMX)"
