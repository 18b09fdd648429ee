"""PROGRAM: `astar doctor --cluster`: whether a run should start on the nodes of a Ray cluster, before it does.

It waits for the nodes, asks each what it has, and measures what lies between them. The script that started the nodes
acts on the lines `left out: NODE`, and on the exit status: 0 where the run can start without these.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from astar_megatron.cluster import links, survey
from astar_megatron.cluster.cluster import Cluster
from astar_megatron.cluster.demands import check_job
from astar_megatron.cluster.nodes import appears
from astar_megatron.cluster.placement import Node
from astar_megatron.cluster.survey import Clock
from astar_megatron.config import ClusterConfig, RunConfig
from astar_megatron.data.files import write_json
from astar_megatron.run import node_facts
from astar_megatron.run.node_facts import NodeFacts
from astar_megatron.run.node_faults import Fault, Report, Verdict, absent, judge, verdict
from astar_megatron.run.resources import gib

_ANSWER_SECONDS = 120.0  # for every node to start a process and to answer


def main(
    address: str,
    nodes: str,
    num_spare: int = 0,
    seconds: float = 120.0,
    file: Path | None = None,
    *,
    looks: bool,
    planned: tuple[RunConfig, str] | None = None,
) -> int:
    """Say which nodes are bad; returns 1 where the run can't start without them.

    `nodes` are the names that must join within `seconds`, with commas, or how many; without `looks` no more is asked.
    `planned` is a run and the command of astar that is to begin: PlacementError where it does not suit the nodes.
    """
    until = time.monotonic() + seconds
    wanted = wanted_nodes(nodes)
    survey.wait_for_head(address, until)
    with Cluster(ClusterConfig(address=address)):
        joined = survey.wait_for_nodes(wanted, until)
        names = list(wanted) if not isinstance(wanted, int) else [*sorted(joined), *_unnamed(wanted - len(joined))]
        first = next((name for name, node in joined.items() if node.id == survey.own_node()), names[0])
        mine = {name: joined[name] for name in names if name in joined}
        absent_nodes = len(names) - len(mine)
        if planned is not None and absent_nodes <= num_spare:
            check_job(*planned, list(mine.values()), num_spare - absent_nodes)
            print(f"run folder: {Path(planned[0].run_dir).absolute()}")  # slurm/train.sbatch looks there for steps
        collective, reports = _reports(mine) if looks else ("", {})
    alike = planned is None or num_spare > 0
    faults = judge(names, reports, are_alike=alike) if looks else absent(names, mine)
    result = verdict(faults, names, first, num_spare)
    if planned is not None and result.left_out and not result.refusal:
        rest = [node for name, node in mine.items() if name not in result.left_out]
        check_job(*planned, rest, num_spare - len(result.left_out))
    show(names, collective, reports, faults, result)
    if file is not None:
        reported = {name: asdict(report) for name, report in reports.items()}
        tree = {"nodes": names, "collective": collective, "reports": reported}
        tree |= {"faults": [asdict(fault) for fault in faults], **asdict(result)}
        write_json(file, tree)
    return int(bool(result.refusal))


def wanted_nodes(nodes: str) -> Sequence[str] | int:
    """Return the names that `--nodes` lists, or how many it asks for. Raises ValueError."""
    if nodes.isdecimal():
        return int(nodes)
    names = [name.strip() for name in nodes.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise ValueError(f"--nodes: expected names with commas, each once, or a number, got {nodes!r}")
    return names


def _unnamed(number: int) -> list[str]:
    return [f"(node {index + 1} that has no name here)" for index in range(number)]


def _reports(joined: dict[str, Node]) -> tuple[str, dict[str, Report]]:
    with node_facts.marked(Path.cwd()) as (folder, mark):
        facts = survey.ask_all(joined, _ANSWER_SECONDS, node_facts.measure, str(folder), mark)
        written = {
            name: bool(fact.wrote) and appears(str(folder), fact.wrote)
            for name, fact in facts.items()
            if isinstance(fact, NodeFacts)
        }
    answering = {name: node for name, node in joined.items() if name in written}
    clocks = survey.clocks(answering)
    collective, speeds = links.bandwidths(answering)
    return collective, {
        name: Report(
            joined=node,
            facts=facts[name],
            clock=clocks.get(name, "did not answer"),
            bandwidth=speeds.get(name),
            written=written.get(name, False),
        )
        for name, node in joined.items()
    }


def show(
    names: Sequence[str], collective: str, reports: dict[str, Report], faults: Sequence[Fault], result: Verdict
) -> None:
    """Print a table of the nodes, then what is wrong, then what follows."""
    console = Console(width=140, highlight=False, markup=False)
    table = Table("node", "GPUs", "driver", "disk", "/dev/shm", "clock", f"all-reduce, {collective}", box=None)
    for name, report in reports.items():
        facts, clock, speed = report.facts, report.clock, report.bandwidth
        cells = ["", "", "", ""]
        if isinstance(facts, NodeFacts):
            free = gib(facts.disk_bytes), gib(facts.shared_memory_bytes)
            cells = [str(report.joined.num_gpus), facts.driver or "none", *free]
        cells.append(f"{clock.seconds:+.2f} s" if isinstance(clock, Clock) else "")
        table.add_row(name, *cells, f"{speed / 1e9:.2f} GB/s" if isinstance(speed, float) else "")
    if reports:
        console.print(table)
    for fault in faults:
        console.print(f"{fault.node} is bad: {fault.check}: {fault.state}", soft_wrap=True)
    for name in result.left_out:
        console.print(f"left out: {name}", soft_wrap=True)
    good = len(names) - len({fault.node for fault in faults})
    console.print(result.refusal or f"{good} of {len(names)} nodes can be used", soft_wrap=True)
