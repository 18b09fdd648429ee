"""Holds a CPU with AVX-512 to AVX2 in every process that has this folder on its path: torch, MKL, oneDNN and vLLM.

    export ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2
    PYTHONPATH=tests/benchmarks/held_to_avx2:. .venv/bin/python tests/benchmarks/demo.py --trl runs/trl

The variables are for the first three. vLLM asks torch.cpu what the CPU has, and `dtype: auto` the kernel.
"""

import contextlib
import os

if os.environ.get("ATEN_CPU_CAPABILITY") == "avx2":
    with contextlib.suppress(ImportError):  # a process of another Python
        import torch.cpu

        capabilities = dict(torch.cpu.get_capabilities())
        lacks = {name: False for name in capabilities if "avx512" in name or "amx" in name}
        torch.cpu.get_capabilities = lambda: capabilities | lacks
        for name in vars(torch.cpu).copy():
            if name.startswith(("_is_avx512", "_is_amx", "_is_vnni")):
                setattr(torch.cpu, name, lambda: False)

        from astar_megatron.model import compute_type

        compute_type.native_bfloat16 = lambda root=None: []
