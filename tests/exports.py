"""Exports of given weights, for the tests that read, damage or compare them."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from conversion import hf


def write_export(
    folder: Path, weights: Mapping[str, Tensor], source: Path, max_shard_bytes: float = hf.MAX_SHARD_BYTES
) -> None:
    """Write `weights`, under their HF names and of one type, with the configuration and tokenizer of `source`."""
    with hf.writing(folder, source, next(iter(weights.values())).dtype, max_shard_bytes) as export:
        for name, tensor in export.tensors.items():
            tensor.copy_(weights[name])
