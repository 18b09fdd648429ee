"""The proof that an export's files hold what the ranks do: digests of both ends, and the row where they part."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from conversion.plan import WeightMismatch, WeightPlan
from conversion.verify import Holdings, Verifier, first_bad_row, sent_parts, tensor_digests


def check_export(
    weight_plan: WeightPlan,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    version: int,
    written: Mapping[str, Tensor] | None,
) -> dict[str, str]:
    """Return the digests of the whole tensors `written` by rank 0 (None elsewhere); collective.

    WeightMismatch on every rank, naming tensor and first bad row, unless they are those of what `weight_plan` sent.
    """
    rank = dist.get_rank()
    holdings = Holdings(sent_parts(weight_plan, rank), tensors, dtype)
    manifest = Verifier(weight_plan).manifest(version, dict(enumerate(_gathered(holdings.digests()))))
    digests = tensor_digests(written or {})
    expected = manifest.digests_by_name()
    wrong = next((name for name, value in expected.items() if digests.get(name) != value), None)
    wrong = _from_first(wrong if rank == 0 else None)
    if wrong is None:
        return digests
    mine = [(part.rectangle, holdings.rows(i)) for i, part in enumerate(holdings.parts) if part.hf == wrong]
    sent = [entry for entries in _gathered(mine) for entry in entries]
    row = _from_first(first_bad_row(written[wrong], sent) if written is not None else None)
    detail = f"digest of the whole expected {expected[wrong]}, got {_from_first(digests.get(wrong))}"
    raise WeightMismatch(version=version, tensor=wrong, where="the export", row=row, detail=detail)


def _gathered(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _from_first(value: Any) -> Any:
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]
