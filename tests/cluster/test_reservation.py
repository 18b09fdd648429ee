"""A placement made real in Ray: actors land on their nodes with their GPUs; refused where others hold these."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Ray is told how many GPUs its nodes have; there are none. Both nodes have one address here; their ids differ.
PROGRAM = """
import os, ray
from ray.cluster_utils import Cluster as Nodes
from astar_megatron.cluster.errors import ClusterError
from astar_megatron.cluster.placement import Node, place
from astar_megatron.cluster.reservation import Reservation
from astar_megatron.config import ParallelConfig, RolloutConfig
class Where:
    def answer(self): return ray.get_runtime_context().get_node_id(), os.environ.get("CUDA_VISIBLE_DEVICES")
def answers(reservation):
    seats = (*reservation.placement.ranks, *reservation.placement.engines)
    strategies = [reservation.strategy(seat) for seat in seats]
    actors = [ray.remote(Where).options(num_cpus=0, scheduling_strategy=strategy).remote() for strategy in strategies]
    return [(node, seat) for (node, _), seat in zip(ray.get([actor.answer.remote() for actor in actors]), seats)]
head = {"num_cpus": 1, "num_gpus": 2, "include_dashboard": False}
nodes = Nodes(initialize_head=True, connect=True, head_node_args=head)
nodes.add_node(num_cpus=1, num_gpus=3)
nodes.wait_for_nodes()
ours = sorted(
    (Node(address=n["NodeManagerAddress"], num_gpus=int(n["Resources"]["GPU"]), id=n["NodeID"]) for n in ray.nodes()),
    key=lambda node: node.num_gpus,
)
placement = place(ours, ParallelConfig(tensor=2), RolloutConfig(num_engines=1, tensor=2), False)
reservation = Reservation(placement, 120)
print([(node == seat.node.id, seat.node.num_gpus, seat.gpus) for node, seat in answers(reservation)])
print(ray.available_resources()["GPU"])
print(sorted(reservation.on_gpus(lambda: os.environ["CUDA_VISIBLE_DEVICES"]).values()))
try:
    Reservation(placement, 1)
except ClusterError as error:
    print(error)
"""


@pytest.mark.slow
def test_actors_land_on_their_nodes_and_nobody_else_gets_their_gpus() -> None:
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    where, left, visible, refusal = done.stdout.splitlines()[-4:]
    assert where == "[(True, 2, ('0',)), (True, 2, ('1',)), (True, 3, ('0', '1'))]"
    assert float(left) == 1.0
    assert visible == "['0,1', '0,1']"
    assert "2 GPUs of node" in refusal and "other work of this cluster holds them" in refusal
