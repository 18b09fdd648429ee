"""How the weights of a rank leave it: to engines, again and again, and once into a Hugging Face folder."""

import dataclasses
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from astar_megatron.model.export_check import check_export
from conversion import hf
from conversion.families import Model
from conversion.plan import WeightPlan, plan
from conversion.tiles import ParallelLayout, Tile
from conversion.transfer.route import Route, Sender, here
from conversion.verify import Holdings, sent_parts


@dataclass(frozen=True, slots=True, kw_only=True)
class RankWeights:
    """The weights of one rank, uncopied, and which part of which model they are; they travel as `dtype`."""

    model: Model
    layout: ParallelLayout
    rank: int
    tensors: Mapping[str, Tensor]
    dtype: torch.dtype

    def plan_to(self, tiles: list[Tile]) -> WeightPlan:
        """Return the plan by which all ranks send to `tiles`."""
        return plan(self.model.megatron_tiles(self.layout, self.layout.senders()), tiles)


@dataclass(frozen=True, slots=True)
class Publishing:
    """One rank's end of a route to engines, and the digests of what it sends there."""

    sender: Sender
    holdings: Holdings


def open_publish(weights: RankWeights, route: Route) -> Publishing:
    """Return the rank's end of `route`, which leads to engines of `route.num_workers` workers."""
    weight_plan = weights.plan_to(weights.model.vllm_tiles(route.num_workers))
    sender = route.sender(weight_plan, weights.rank, weights.tensors, weights.dtype)
    return Publishing(sender, Holdings(sent_parts(weight_plan, weights.rank), weights.tensors, weights.dtype))


def export(weights: RankWeights, route: Route, folder: str, *, model_folder: str, version: int) -> None:
    """Write the weights as a Hugging Face folder like `model_folder`; collective, rank 0 writes.

    They stream through buckets into the files; conversion.json gets the layout they came from and their digests,
    computed at both ends. Raises WeightMismatch, and leaves no folder, if the files do not hold what the ranks do.
    """
    tensors, dtype = weights.tensors, weights.dtype
    weight_plan = weights.plan_to(weights.model.hf_tiles())
    sender = route.sender(weight_plan, weights.rank, tensors, dtype)
    try:
        dist.barrier()  # every sender's file is there
        if weights.rank == 0:
            with hf.writing(folder, model_folder, dtype) as files:
                receiver = route.receiver(weight_plan, 0, files.tensors, dtype)
                with ThreadPoolExecutor(1) as beside:
                    sending = beside.submit(sender.send)
                    receiver.receive()
                    sending.result()
                receiver.close()
                digests = check_export(weight_plan, tensors, dtype, version, files.tensors)
                files.record.update(layout=dataclasses.asdict(weights.layout), digests=digests)
        else:
            sender.send()
            check_export(weight_plan, tensors, dtype, version, None)
        dist.barrier()
    finally:
        sender.close()


def export_route(folder: str, rendezvous: tuple[str, int], number: int) -> Route:
    """Return the way to rank 0's files: shared memory if all ranks see `folder`, else gloo; collective.

    `number` is that of the export among those of these ranks.
    """
    seen: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(seen, here(torch.device("cpu")).memory if Path(folder).is_dir() else None)
    host, port = rendezvous
    return Route(
        way="shared memory" if seen[0] and len(set(seen)) == 1 else "gloo",
        num_sources=len(seen),
        num_engines=1,
        num_workers=1,
        folder=folder,
        host=host,
        port=port,
        name=f"export-{number}",
    )
