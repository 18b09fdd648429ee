"""THE type that policy, reference and engines compute in; runs, plans, checks and the doctor ask here. No torch."""

import re
from pathlib import Path
from typing import Literal

from astar_megatron.config import Dtype

type ComputeType = Literal["bfloat16", "float32"]

NUMBER_BYTES: dict[ComputeType, int] = {"bfloat16": 2, "float32": 4}


def compute_type(name: Dtype, num_gpus: int) -> tuple[ComputeType, str]:
    """Return what `model.dtype` means for a run on so many GPUs, with the reason in words.

    `auto` is bfloat16 on GPUs and on CPUs whose matrix units take it (AVX512_BF16, AMX); emulated bfloat16 is ten
    times slower than float32, so other CPUs compute in float32.
    """
    if name != "auto":
        return name, f"{name}: asked for by model.dtype"
    if num_gpus:
        return "bfloat16", "bfloat16: the cluster has GPUs"
    if native_bfloat16():
        return "bfloat16", "bfloat16: this CPU multiplies it natively"
    return "float32", "float32: this CPU has no native bfloat16 (AVX512_BF16 or AMX)"


def native_bfloat16(root: Path = Path("/")) -> list[str]:
    """Return the instructions of an x86-64 CPU that multiply bfloat16, by the kernel's names; none: it is emulated."""
    try:
        cpuinfo = (root / "proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return []
    flags = re.search(r"^flags\s*:(.*)$", cpuinfo, re.MULTILINE)
    return sorted({"amx_bf16", "avx512_bf16"} & set(flags[1].split() if flags else ()))
