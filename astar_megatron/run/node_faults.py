"""Which nodes of a cluster a run should not start on, and why. Pure: node_facts.py, survey.py and links.py measure.

What must be equal is compared with what most nodes have, and where there is no most with the first node. Clocks and
links are compared with the median. Of two nodes nobody can say which one's link is slow.
"""

import statistics
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from astar_megatron.cluster.placement import Node, counted
from astar_megatron.cluster.survey import Clock
from astar_megatron.run.node_facts import NodeFacts
from astar_megatron.run.resources import GIB, gib

SHARED_MEMORY_BYTES = GIB  # Ray's objects, and the buckets of the weights; containers often have 64 MiB
DISK_BYTES = 5 * GIB  # sockets, logs, what Ray spills
CLOCK_SECONDS = 2.0  # more, and leases of a sweep and the order of files are not what they seem
SLOW = 0.5  # of the median


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What has been measured of a node that has joined. A string in place of a value says why there is none.

    `bandwidth` is in bytes a second, None where no partner was there; `written` says whether the driver's node sees
    what this one has written.
    """

    joined: Node
    facts: NodeFacts | str
    clock: Clock | str
    bandwidth: float | str | None
    written: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What is wrong with a node."""

    node: str
    check: str
    state: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Nodes that are to be left out, in the order of the job; and why the run can't start, "" if it can."""

    left_out: tuple[str, ...]
    refusal: str


def judge(wanted: Sequence[str], reports: Mapping[str, Report], *, are_alike: bool = True) -> list[Fault]:
    """Return what is wrong with which node; `wanted` should have joined, `reports` has those that did.

    Nodes that are not alike may differ in how many GPUs they have: kind and driver are compared where there are any.
    """
    faults = [*absent(wanted, reports), *_of_each(reports)]
    facts = {name: report.facts for name, report in reports.items() if isinstance(report.facts, NodeFacts)}
    if not are_alike:
        kinds = {name: ", ".join(dict.fromkeys(node.gpus)) for name, node in facts.items() if node.gpus}
        faults += _unlike("GPUs", kinds)
        faults += _unlike("GPU driver", {name: facts[name].driver for name in kinds})
    else:
        faults += _unlike("GPUs that Ray has", {name: str(reports[name].joined.num_gpus) for name in reports})
        faults += _unlike("GPUs", {name: _counted(node.gpus) for name, node in facts.items()})
        faults += _unlike("GPU driver", {name: node.driver or "none" for name, node in facts.items()})
    packages = dict.fromkeys(package for node in facts.values() for package in node.versions)
    for package in packages:
        faults += _unlike(package, {name: node.versions.get(package, "none") for name, node in facts.items()})
    return [*faults, *_off_clock(reports), *_slow(reports)]


def absent(wanted: Sequence[str], joined: Collection[str]) -> list[Fault]:
    """Return the faults of nodes that have not joined."""
    return [
        Fault(node=name, check="joined", state="has not joined Ray in time") for name in wanted if name not in joined
    ]


def verdict(faults: Sequence[Fault], nodes: Collection[str], first: str, num_spare: int) -> Verdict:
    """Return what to do about faults of `nodes`: `num_spare` of them may be left out, but not the driver's, `first`."""
    bad = [name for name in nodes if any(fault.node == name for fault in faults)]
    if first in bad:
        return Verdict(left_out=(), refusal=f"{first} has Ray's head and the program, and can't be left out")
    if len(bad) > num_spare:
        refusal = f"{len(bad)} of {len(nodes)} nodes are bad, {', '.join(bad)}, and {num_spare} may be left out"
        return Verdict(left_out=(), refusal=refusal)
    return Verdict(left_out=tuple(bad), refusal="")


def _of_each(reports: Mapping[str, Report]) -> list[Fault]:
    """What a node has by itself, whatever the others have."""
    faults = []
    for name, report in reports.items():
        if isinstance(report.facts, str):
            faults.append(Fault(node=name, check="answer", state=report.facts))
            continue
        facts = report.facts
        if not facts.reads or not report.written:
            state = (
                "does not see what another node writes" if not facts.reads else "what it writes is not seen by others"
            )
            faults.append(Fault(node=name, check="shared folder", state=state))
        gpus = report.joined.num_gpus
        if facts.cores < (least_cores := max(2, gpus) if gpus else 0):
            ask = f"ask for more: sbatch --exclusive, or --cpus-per-task={least_cores} or more"
            faults.append(Fault(node=name, check="cores", state=f"{facts.cores:g} for {counted(gpus, 'GPU')}; {ask}"))
        for check, free, least in (
            ("disk", facts.disk_bytes, DISK_BYTES),
            ("/dev/shm", facts.shared_memory_bytes, SHARED_MEMORY_BYTES),
        ):
            if free < least:
                faults.append(Fault(node=name, check=check, state=f"{gib(free)} free, {gib(least)} wanted"))
    return faults


def _unlike(check: str, values: Mapping[str, str]) -> list[Fault]:
    """Those that do not have what most have; of as many on both sides, what the first node has."""
    if len(set(values.values())) < 2:
        return []
    usual = Counter(values.values()).most_common(1)[0][0]
    return [
        Fault(node=name, check=check, state=f"{value}, others {usual}")
        for name, value in values.items()
        if value != usual
    ]


def _off_clock(reports: Mapping[str, Report]) -> list[Fault]:
    clocks = {name: report.clock for name, report in reports.items() if isinstance(report.clock, Clock)}
    if not clocks:
        return []
    seconds = sorted(clock.seconds for clock in clocks.values())
    usual = min(statistics.median_low(seconds), statistics.median_high(seconds), key=abs)  # of two: the driver's
    faults = []
    for name, clock in clocks.items():
        ahead = clock.seconds - usual
        if abs(ahead) - clock.error_seconds > CLOCK_SECONDS:
            state = f"{abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} the others; set it (ntp, chrony)"
            faults.append(Fault(node=name, check="clock", state=state))
    return faults


def _slow(reports: Mapping[str, Report]) -> list[Fault]:
    speeds = {name: report.bandwidth for name, report in reports.items() if isinstance(report.bandwidth, float)}
    usual = statistics.median(speeds.values()) if speeds else 0.0
    faults = []
    for name, report in reports.items():
        speed = report.bandwidth
        if isinstance(speed, str):
            faults.append(Fault(node=name, check="link", state=f"no all-reduce with any other node: {speed}"))
        elif speed is not None and speed < SLOW * usual:
            state = f"{speed / 1e9:.2f} GB/s, the median is {usual / 1e9:.2f} GB/s"
            faults.append(Fault(node=name, check="link", state=state))
    return faults


def _counted(names: Sequence[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in Counter(names).items()) or "none"
