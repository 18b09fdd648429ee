"""Ends in words, with status 1, where `make gpu-check` can't run: without torch, Triton, pytest or a GPU."""

import sys
from importlib.util import find_spec


def problem() -> str | None:
    """Return what this machine lacks, and what to change."""
    missing = [package for package in ("torch", "triton", "pytest") if find_spec(package) is None]
    if missing:
        return f"gpu-check: {sys.executable} has no {' and no '.join(missing)}; name a python that has: GPU_PYTHON=<it>"
    import torch

    if not torch.cuda.is_available():
        return f"gpu-check: torch {torch.__version__} of {sys.executable} sees no GPU; run it on a machine that has one"
    return None


if __name__ == "__main__":
    sys.exit(problem())
