"""GPUs by name: what a rank's MFU is stated against, and what `astar plan` counts with. Needs no torch.

From NVIDIA's data sheets of each product: bfloat16 without sparsity, SXM modules where the name says nothing else,
speeds of links in one direction. Memory is what the driver reports for the card (nvidia-smi), in MiB.
"""

from dataclasses import dataclass
from math import inf

_MIB = 1 << 20
_GEN4, _GEN5 = 32e9, 64e9  # bytes a second of 16 lanes of PCIe


@dataclass(frozen=True, slots=True)
class Gpu:
    """A kind of GPU; rates are a second."""

    name: str  # a part of the device's name, as torch has it
    capability: float
    memory_bytes: int
    peak_flops: float  # dense bfloat16
    memory_rate: float  # bytes of its own memory
    link_rate: float  # bytes to another GPU of the node: NVLink, or PCIe
    host_rate: float  # bytes to the host's memory


# From which on Transformer Engine's own fused attention takes packs (thd); before it flash-attn's does.
FUSED_PACKS_CAPABILITY = 9.0
# From which on, and before which, it computes by a recipe of FP8: "Datatype and hardware support matrix" of its pages
# (nvidia.github.io/TransformerEngine/support_matrix.html).
_FP8_CAPABILITIES = {"tensorwise": (8.9, inf), "blockwise": (9.0, inf), "mxfp8": (10.0, 12.0)}

# Of a device the first whose name is a part of the device's.
GPUS = (
    Gpu("GB200", 10.0, 189471 * _MIB, 2500e12, 8.0e12, 900e9, 450e9),
    Gpu("B200", 10.0, 183359 * _MIB, 2250e12, 8.0e12, 900e9, _GEN5),
    Gpu("GH200", 9.0, 97871 * _MIB, 989e12, 4.0e12, 450e9, 450e9),
    Gpu("H200", 9.0, 143771 * _MIB, 989e12, 4.8e12, 450e9, _GEN5),
    Gpu("H20", 9.0, 97871 * _MIB, 148e12, 4.0e12, 450e9, _GEN5),
    Gpu("H100 PCIe", 9.0, 81559 * _MIB, 756e12, 2.0e12, _GEN5, _GEN5),
    Gpu("H100 NVL", 9.0, 95830 * _MIB, 835e12, 3.9e12, 300e9, _GEN5),
    Gpu("H100", 9.0, 81559 * _MIB, 989e12, 3.35e12, 450e9, _GEN5),
    Gpu("A100-SXM4-40GB", 8.0, 40960 * _MIB, 312e12, 1.555e12, 300e9, _GEN4),
    Gpu("A100", 8.0, 81920 * _MIB, 312e12, 2.039e12, 300e9, _GEN4),
    Gpu("A800", 8.0, 81920 * _MIB, 312e12, 2.039e12, 200e9, _GEN4),
    Gpu("A10G", 8.6, 23028 * _MIB, 70e12, 0.6e12, _GEN4, _GEN4),
    Gpu("A10", 8.6, 23028 * _MIB, 125e12, 0.6e12, _GEN4, _GEN4),
    Gpu("L40S", 8.9, 46068 * _MIB, 362e12, 0.864e12, _GEN4, _GEN4),
    Gpu("L40", 8.9, 46068 * _MIB, 181e12, 0.864e12, _GEN4, _GEN4),
    Gpu("L4", 8.9, 23034 * _MIB, 121e12, 0.3e12, _GEN4, _GEN4),
)


def of_device(device_name: str) -> Gpu | None:
    """Return the kind of a device by the name that torch has for it; None for one that is not in the table."""
    return next((gpu for gpu in GPUS if gpu.name in device_name), None)


def named(name: str) -> Gpu:
    """Return the kind of this name, in capitals or not. Raises ValueError with all names."""
    if gpu := next((gpu for gpu in GPUS if gpu.name.lower() == name.lower()), None):
        return gpu
    raise ValueError(f"--gpu {name}: expected one of {', '.join(gpu.name for gpu in GPUS)}")


def refused_fp8(recipe: str | None, capability: float) -> str:
    """Return why a GPU of a compute capability has no such recipe of FP8 (`model.fp8`); "" where it has, or none is."""
    taken = [name for name, (first, end) in _FP8_CAPABILITIES.items() if first <= capability < end]
    if recipe is None or recipe in taken:
        return ""
    first, end = _FP8_CAPABILITIES[recipe]
    before = "" if end == inf else f" and before {end}"
    return (
        f"model.fp8={recipe}: Transformer Engine computes in it from compute capability {first} on{before}, this GPU "
        f"has {capability}; set model.fp8={' or '.join([*taken, 'null'])}"
    )
