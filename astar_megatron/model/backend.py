"""THE switch: CPU (gloo) or CUDA (nccl), megatron's local layers or Transformer Engine's, with the reason in words.

Everything that depends on the device and is not the engine's is decided here once a process; other code asks a Backend.
"""

import contextlib
import gc
import importlib
import os
import re
import resource
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import torch

from astar_megatron.config import ModelConfig, OptimConfig
from astar_megatron.model import cpu_shim, gpus

_LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo"}  # the variable may name an interface that is not there, or one that goes
_FLOAT32_ERROR = 1e-5  # of a product
FP8_TOKENS = 32  # Transformer Engine's FP8 products take a multiple of so many tokens, or of fewer by recipe
# Transformer Engine asks cuBLAS for TF32 whatever torch is told; this overrules it. A process that computes in float32
# is started with it; `Backend.check` sees whether it helped.
FLOAT32_ENVIRONMENT = {"NVIDIA_TF32_OVERRIDE": "0"}
# One part of torch reads the first of these and then no other, another the second.
_ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_SET_HERE = (  # what a rank decides itself of the allocator; backends beside torch's own share no memory
    "",  # behind a comma too many
    "backend",
    "expandable_segments",
    "pinned_max_round_threshold_mb",
    "pinned_max_cached_size_mb",
    "per_process_memory_fraction",
)
_LOCAL = (
    "megatron's local layers and optimizer, and attention in torch (prefixes shared in a pack; context-parallel ranks "
    "gather keys and values)"
)
_ENGINE = (
    "Transformer Engine's layers, optimizer and attention (packs as thd, no shared prefix; context-parallel ranks pass "
    "keys and values round a ring)"
)

# The fusions of megatron-core 0.19.2 beside Transformer Engine 2.20. Together the first four halve a step: 7.8 s to
# 3.85 s, MFU 0.24 to 0.486 (Qwen2.5-1.5B's shape on one H200, packs of 16,384 tokens); `make gpu-check` measures it.
# Weight gradients are summed inside their products too: build.sum_weight_gradients_in_place. Left out:
# - masked_softmax_fusion, fused_single_qkv_rope: not reached. Transformer Engine's attention has no such softmax, and
#   megatron refuses the other for packs (thd).
# - cross_entropy_loss_fusion, defer_embedding_wgrad_compute: of megatron's output layer, whose product the head does.
# - fused_residual_rmsnorm: of norms that stand alone, before experts only; dense layers have theirs inside the linears.
# - use_te_activation_func: excludes bias_activation_fusion, and adds the biases in a pass of its own.
# - moe_router_fusion: no model with experts has been run with Transformer Engine yet (moe_permute_fusion: build.py).
# - use_transformer_engine_op_fuser: other modules with other names of their weights, for MXFP8 on Blackwell.
# - tp_comm_overlap: its buffers have one size for the whole run, and no two packs have the same number of tokens; for
#   the same reason there are no CUDA graphs of a step (cuda_graph_impl).
_ENGINE_FUSIONS = {
    "apply_rope_fusion": True,  # unfused it is a loop over the sequences of a pack, in Python
    "bias_activation_fusion": True,  # SwiGLU as one kernel, compiled by torch
    "bias_dropout_fusion": True,  # the residual's addition
    "persist_layer_norm": True,  # of LayerNorm; RMSNorm has no other kernel
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """What a Megatron rank runs on."""

    name: Literal["cpu", "cuda"]
    uses_transformer_engine: bool  # its layers and attention; else megatron's local layers and model/attention.py
    has_triton: bool  # and a device to run its kernels on
    reason: str

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.name == "cpu" else torch.device("cuda", torch.cuda.current_device())

    @property
    def collectives(self) -> Literal["gloo", "nccl"]:
        return "gloo" if self.name == "cpu" else "nccl"

    @property
    def shares_prefix(self) -> bool:
        """The attention can keep a prefix that all sequences of a pack share once (model/attention.py)."""
        return not self.uses_transformer_engine

    def describe(self) -> str:
        """Say in words what was chosen, what is missing, and what MFU is stated against."""
        if self.peak_flops is None:
            return f"{self.reason}; no MFU: the peak of this device is not known"
        return f"{self.reason}; MFU against {self.peak_flops / 1e12:g} TFLOP/s, dense bfloat16"

    @property
    def peak_flops(self) -> float | None:
        """Dense bfloat16 FLOPs a second at most, by the device's name, which MFU is stated against; else None."""
        if self.name == "cpu":
            return None
        gpu = gpus.of_device(torch.cuda.get_device_name(self.device))
        return gpu and gpu.peak_flops

    def peak_memory_bytes(self) -> int:
        """Return the most that this rank's tensors held on the device; on CPU the most its process held."""
        if self.name == "cpu":
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return torch.cuda.max_memory_allocated()

    def wait(self) -> None:
        """Return when the device has done all that it was given."""
        if self.name == "cuda":
            torch.cuda.synchronize()

    def release_cache(self) -> int:
        """Give memory that no tensor holds back to the device; return the bytes that this process still has of it."""
        if self.name == "cpu":
            return 0
        gc.collect()
        self.wait()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    def unfused_attention(self, dtype: torch.dtype) -> str:
        """Return in words why packs get none of Transformer Engine's fused attention kernels; "" where they get one."""
        if not self.uses_transformer_engine:
            return ""
        major, minor = torch.cuda.get_device_capability(self.device)
        return unfused_attention(major + minor / 10, dtype, has_flash=find_spec("flash_attn") is not None)

    def check(self, dtype: torch.dtype, *, context: int, has_experts: bool) -> None:
        """Raise ValueError where the layers can't be those of a reference, or round float32.

        Attention may not be split over `context` ranks; experts' sums may have no order; products may be made in fewer
        bits than float32 has: tried here, not assumed.
        """
        if has_experts and self.name == "cuda" and not self.uses_transformer_engine:
            raise ValueError(
                "model.path: on a GPU a model with experts needs Transformer Engine, which sums what experts give in a "
                "fixed order, and it is not installed; install the extra cuda"
            )
        if context > 1 and (reason := self.unfused_attention(dtype)):
            raise ValueError(
                f"parallel.context={context}: Transformer Engine splits attention in its fused kernels alone, and "
                f"{reason}; set parallel.context=1"
            )
        if dtype != torch.float32 or not self.uses_transformer_engine:
            return  # torch multiplies float32 in float32 unless it is told otherwise
        engine: Any = importlib.import_module("transformer_engine.pytorch")
        linear = engine.Linear(512, 64, bias=False, params_dtype=torch.float32, device=self.device)
        check_float32(product_error(linear, linear.weight.detach()))

    @contextlib.contextmanager
    def range(self, name: str) -> Iterator[None]:
        """Have profilers show the body under `astar <name>`: torch's on any device, the device's own too (NVTX)."""
        label = f"astar {name}"
        nvtx = contextlib.nullcontext() if self.name == "cpu" else torch.cuda.nvtx.range(label)
        with torch.profiler.record_function(label), nvtx:
            yield

    def profiler(self) -> torch.profiler.profile:
        """Return a profiler of operators and the device's kernels; without shapes and stacks, which cost most bytes."""
        kinds = torch.profiler.ProfilerActivity
        return torch.profiler.profile(activities=[kinds.CPU] if self.name == "cpu" else [kinds.CPU, kinds.CUDA])

    def transformer_options(self, fp8: str | None = None) -> dict[str, Any]:
        """Return TransformerConfig options that this device needs or that `fp8`, a recipe, asks it for."""
        if self.uses_transformer_engine:
            # e4m3 forward and e5m2 for gradients. Delayed scaling is not offered: it rounds by what earlier batches
            # held, so policy and reference would differ at step 0.
            return _ENGINE_FUSIONS | ({"fp8": "hybrid", "fp8_recipe": fp8} if fp8 else {})
        return {
            "use_cpu_initialization": self.name == "cpu",
            # What follows needs kernels of Transformer Engine or apex, or torch.compile, which a CPU's ranks turn off.
            "gradient_accumulation_fusion": False,
            "masked_softmax_fusion": False,
            "bias_dropout_fusion": False,
            "bias_activation_fusion": False,
            "apply_rope_fusion": False,
            "persist_layer_norm": False,
        }


@cache
def choose() -> Backend:
    """Return this process's backend; where CUDA or Transformer Engine lacks it also makes megatron-core run there.

    Call in the thread that builds and runs the model, before megatron is imported elsewhere in it.
    """
    if not torch.cuda.is_available():
        cpu_shim.install()
        return Backend(
            name="cpu",
            uses_transformer_engine=False,
            has_triton=False,
            reason=f"torch {torch.__version__} sees no CUDA device; {_LOCAL}; the head in plain torch",
        )
    torch.cuda.set_device(0)  # a rank sees only its own GPU
    engine, triton = uses_transformer_engine(num_gpus=1), find_spec("triton") is not None
    if not engine:
        cpu_shim.repair_optimizer_state()
    return Backend(
        name="cuda",
        uses_transformer_engine=engine,
        has_triton=triton,
        reason=f"CUDA device {torch.cuda.get_device_name(0)}; "
        + (_ENGINE if engine else f"no Transformer Engine: {_LOCAL}")
        + ("; the head in Triton" if triton else "; no Triton: the head in plain torch"),
    )


def uses_transformer_engine(num_gpus: int) -> bool:
    """Say whether ranks with GPUs, on machines installed like this one, build Transformer Engine's layers."""
    return num_gpus > 0 and find_spec("transformer_engine") is not None


def unfused_attention(capability: float, dtype: torch.dtype, *, has_flash: bool) -> str:
    """Return why Transformer Engine has no fused attention kernel for packs (thd) of a type; "" where it has one."""
    if dtype == torch.float32:
        return "none of them takes float32"
    if capability < gpus.FUSED_PACKS_CAPABILITY and not has_flash:
        return (
            f"its own takes packs from compute capability {gpus.FUSED_PACKS_CAPABILITY} on, this GPU has {capability}, "
            "and flash-attn, which it takes else, is not installed"
        )
    return ""


def product_error(linear: Callable[[torch.Tensor], torch.Tensor], weight: torch.Tensor) -> float:
    """Return the relative error, against float64, of what `linear` makes of random rows with its float32 `weight`.

    Products in float32 have 1e-7; in TF32, which keeps 10 bits of each factor, 3e-4.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(64, weight.size(1), generator=generator).to(weight.device)
    with torch.no_grad():
        exact = rows.double() @ weight.double().t()
        return float((linear(rows).double() - exact).norm() / exact.norm())


def check_float32(error: float) -> None:
    """Raise ValueError where a `product_error` says that float32 is multiplied in fewer bits."""
    if error > _FLOAT32_ERROR:
        raise ValueError(
            f"model.dtype=float32: Transformer Engine multiplies float32 in fewer bits here, as TF32 (relative error "
            f"{error:.1e} of a product, expected at most {_FLOAT32_ERROR:.0e}); set model.dtype=bfloat16, or start "
            "this process with NVIDIA_TF32_OVERRIDE=0 in its environment, as `astar` does"
        )


def check_features(model: ModelConfig, optim: OptimConfig, num_gpus: int, capability: float | None = None) -> None:
    """Raise ValueError for a setting that ranks on machines installed like this one could not honour.

    `capability` is the least of the GPUs' compute capabilities, None where that is not known.
    """
    if capability is not None and (refused := gpus.refused_fp8(model.fp8, capability)):
        raise ValueError(refused)
    engine = uses_transformer_engine(num_gpus)
    lacking = "Transformer Engine is not installed" if num_gpus else "there is no GPU"
    if model.fp8 and not engine:
        raise ValueError(
            f"model.fp8={model.fp8}: only Transformer Engine's layers compute in FP8, and {lacking}; set model.fp8=null"
        )
    if model.reference == "offload" and not num_gpus:
        raise ValueError(
            "model.reference=offload: without a GPU there is no second memory to move the reference to; "
            "set model.reference=resident"
        )
    if optim.offload and model.dtype == "float32":
        raise ValueError(
            "optim.offload with model.dtype=float32: Megatron's offloaded optimiser can't load a checkpoint of float32 "
            "weights; set model.dtype=bfloat16, or optim.offload=false"
        )
    if optim.offload and not engine:
        raise ValueError(
            "optim.offload: Megatron keeps optimiser states in host memory only beside a GPU and with Transformer "
            f"Engine's optimizer, and {lacking}; set optim.offload=false"
        )


def environment(
    *, gpus: Sequence[str], threads: int, num_nodes: int, dtype: str, memory_share: float = 1.0
) -> dict[str, str]:
    """Return the environment variables that a rank needs before it imports torch.

    It sees the `gpus` of these names, and `memory_share` is the part of their memory that its tensors may take.
    """
    common = {"PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    common |= {"OMP_PROC_BIND": "false"}  # else all ranks of a node whose environment binds threads share a core
    if gpus:
        common |= {"CUDA_VISIBLE_DEVICES": ",".join(gpus), "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
        # Where the switch sums (NVLS), the order may be another in each call: no two passes would be equal to the bit.
        common |= {"NCCL_NVLS_ENABLE": "0"} | dict.fromkeys(_ALLOCATOR_VARIABLES, _allocator_settings(memory_share))
        return common | (FLOAT32_ENVIRONMENT if dtype == "float32" else {})
    common |= {
        # Threads that spin while the engine computes slow both three-fold.
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "0",
        "TORCHDYNAMO_DISABLE": "1",  # compiling takes longer than the work it would save
    }
    return common | (_LOOPBACK if num_nodes == 1 else {})


def _allocator_settings(memory_share: float) -> str:
    """Return how torch allocates for a rank: as the user's environment says, but for what would break a rank.

    No expandable segments and no other backend, whose memory other processes can't open. Pinned memory in its own
    size, as parking.py and reference.py keep it, not in the next power of two. A rank that wants more than its share
    fails itself, no engine.
    """
    users = next((os.environ[name] for name in _ALLOCATOR_VARIABLES if os.environ.get(name)), "")
    settings = [text for text in re.split(r",(?![^\[]*\])", users) if text.partition(":")[0].strip() not in _SET_HERE]
    settings += ["pinned_max_round_threshold_mb:1", "pinned_max_cached_size_mb:1"]
    if memory_share < 1.0:
        settings.append(f"per_process_memory_fraction:{memory_share:.4f}")
    return ",".join(settings)


def stay_on_loopback() -> None:
    """Make gloo in this process, a rank alone, use loopback; before its group is made."""
    os.environ.update(_LOOPBACK)


def read_no_code() -> None:
    """Make torch in this process take plain data only from files, whatever its caller says; see plain_in_torch."""
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
