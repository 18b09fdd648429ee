"""The one placement group of a run: a bundle a node, with the GPUs that the run has there. Seats are made real here."""

from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from astar_megatron.cluster.errors import ClusterError
from astar_megatron.cluster.placement import Placement, Seat, counted

_A_LITTLE = 0.001  # of the resource that each node has one of: a bundle may not be empty


class Reservation:
    """The nodes and GPUs of a placement, held until Ray's session is left. Raises ClusterError where others hold them.

    `placement` has the GPUs by the names that Ray has for them.
    """

    def __init__(self, placement: Placement, timeout_seconds: float) -> None:
        with_seats = {seat.node for seat in (*placement.ranks, *placement.engines)}
        self._nodes = [node for node in placement.nodes if node in with_seats]
        self._bundles = {node.id: bundle for bundle, node in enumerate(self._nodes)}
        gpus = {node.id: len(names) for node, names in placement.gpus().items()}
        self._with_gpus = {node.id: gpus[node.id] for node in self._nodes if gpus[node.id]}
        self._group = placement_group(
            [
                {f"node:{node.address}": _A_LITTLE} | ({"GPU": n} if (n := gpus[node.id]) else {})
                for node in self._nodes
            ],
            bundle_label_selector=[{"ray.io/node-id": node.id} for node in self._nodes],
        )
        self._timeout_seconds = timeout_seconds
        if not self._group.wait(timeout_seconds):
            remove_placement_group(self._group)
            asked = ", ".join(f"{counted(gpus[node.id], 'GPU')} of node {node.address}" for node in self._nodes)
            raise ClusterError(
                f"Ray did not give {asked} in {timeout_seconds:.0f} s (cluster.start_timeout_seconds): other work of "
                "this cluster holds them (`ray status`); wait for its end, or ask for less"
            )
        self.placement = placement.numbered(self.on_gpus(_gpu_names))

    def strategy(self, seat: Seat) -> PlacementGroupSchedulingStrategy:
        """Return how Ray is told to start an actor on a seat's node."""
        return self._on(seat.node.id)

    def _on(self, node: str) -> PlacementGroupSchedulingStrategy:
        return PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=self._bundles[node])

    def on_gpus[T](self, function: Callable[[], T]) -> dict[str, T]:
        """Return what a function answers on each node where the run has GPUs, by Ray's id, in a process that has them.

        The process ends with it: it would keep memory of the GPUs.
        """
        answers: dict[str, Any] = {}
        for node, number in self._with_gpus.items():
            options: dict[str, Any] = {"num_cpus": 0, "num_gpus": number, "max_calls": 1, "max_retries": 0}
            answers[node] = ray.remote(**options, scheduling_strategy=self._on(node))(function).remote()
        try:
            return dict(zip(answers, ray.get(list(answers.values()), timeout=self._timeout_seconds), strict=True))
        except RayError as error:
            raise ClusterError(f"GPUs of the cluster: {str(error).strip().splitlines()[-1]}") from None


def _gpu_names() -> list[str]:
    return ray.get_runtime_context().get_accelerator_ids()["GPU"]
