"""A Slurm of two nodes on this machine, in namespaces of its own: a network of loopback alone, its own process numbers.

Everything in it ends with the process that holds the namespaces. The nodes differ in host name and address, and share
the rest of the machine. What the batch scripts leave behind is what `left_behind` finds.
"""

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ADDRESSES = {"vm": "10.99.0.1", "node1": "10.99.0.11", "node2": "10.99.0.12"}
SECONDS = 600.0  # that anything may take on a busy machine
_NEEDED = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter", "setpriv", "unshare")
_SPACES = ["--net", "--mount", "--pid", "--uts"]
_HOLD = ["setpriv", "--pdeathsig", "KILL", "unshare", *_SPACES, "--mount-proc", "--fork", "--kill-child"]
# glibc asks for no address of 127/8 where a machine has no other, and Ray rewrites 127.0.0.1: so others lie on lo.
_PREPARE = """
set -e
hostname vm
mount --bind {dir}/hosts /etc/hosts
ip link set lo up
for address in {addresses}; do ip addr add $address/32 dev lo; done
munged --force --socket={dir}/munge.socket --key-file={dir}/munge.key --pid-file={dir}/munged.pid \
    --log-file={dir}/munged.log --seed-file={dir}/munge.seed
slurmctld
for node in node1 node2; do unshare --uts sh -c "hostname $node; exec slurmd -N $node"; done
echo ready
sleep infinity &
wait
"""
_CONF = """
ClusterName=test
SlurmctldHost=vm({vm})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5,socket={dir}/munge.socket
SlurmctldPort=16817
FirstJobId={first}
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool.%n
SlurmctldPidFile={dir}/slurmctld.pid
SlurmdPidFile={dir}/slurmd.%n.pid
SlurmctldLogFile={dir}/slurmctld.log
SlurmdLogFile={dir}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
MinJobAge=3600
KillWait=30
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
NodeName=node1 NodeHostname=vm NodeAddr={node1} Port=17001 CPUs=16 RealMemory=8000 State=UNKNOWN
NodeName=node2 NodeHostname=vm NodeAddr={node2} Port=17002 CPUs=16 RealMemory=8000 State=UNKNOWN
PartitionName=test Nodes=node[1-2] Default=YES MaxTime=INFINITE State=UP
"""
_CGROUP = "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\nConstrainCores=no\nConstrainRAMSpace=no\n"
_DAEMONS = ("sh -c", "sleep infinity", "munged", "slurmctld", ": slurmscriptd", "slurmd -N")


@dataclass(frozen=True, slots=True, kw_only=True)
class Slurm:
    """The cluster; `holder` is the first process of its namespaces, `folder` has its files and logs."""

    holder: int
    folder: Path

    def run(
        self, *command: object, cwd: Path | None = None, env: Mapping[str, str] | None = None, seconds: float = SECONDS
    ) -> str:
        """Return the output of a command in it, which must end with 0 within so many seconds."""
        enter = ["nsenter", "-t", str(self.holder), *_SPACES, f"--wd={cwd or self.folder}"]
        environment = os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf")} | dict(env or {})
        done = subprocess.run(
            [*enter, *map(str, command)], env=environment, capture_output=True, text=True, timeout=seconds
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}{self.logs()}"
        return done.stdout

    def submit(self, *words: object, cwd: Path, env: Mapping[str, str]) -> str:
        """Submit a batch script with sbatch's own words before it; its output goes to `<cwd>/<job>.out`."""
        return self.run("sbatch", "--parsable", "--output=%A.out", *words, cwd=cwd, env=env).strip()

    def fact(self, job: str, name: str) -> str:
        """Return a field of what Slurm knows of a job; of an array's tasks, each once."""
        lines = self.run("scontrol", "--oneliner", "show", "job", job).splitlines()
        facts = [word.partition("=")[2] for line in lines for word in line.split() if word.startswith(f"{name}=")]
        return " ".join(sorted(set(facts)))

    def wait(self, job: str, *states: str) -> str:
        """Wait until a job is in one of the states, and return it; by default until it has ended."""
        wanted = set(states or ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT"))
        until = time.monotonic() + SECONDS
        while not set(state := self.fact(job, "JobState").split()) <= wanted:
            assert time.monotonic() < until, f"job {job} is {state}, not {wanted}; {self.logs()}"
            time.sleep(0.3)
        return " ".join(state)

    def processes(self) -> list[str]:
        """Return the command lines of all that runs in the cluster besides its daemons."""
        lines = [line.strip() for line in self.run("ps", "-eo", "args=").splitlines()]
        return [line for line in lines if line != "ps -eo args=" and not any(map(line.startswith, _DAEMONS))]

    def left_behind(self, job: str) -> list[str]:
        """Return what is left of a job that has ended: processes, folders with a token, semaphores."""
        until = time.monotonic() + 60  # Slurm ends a job's steps after it has called the job ended
        while (left := [*self.processes(), *_files_of(job)]) and time.monotonic() < until:
            time.sleep(0.3)
        return left

    def logs(self) -> str:
        """Return the ends of the daemons' logs."""
        return "".join(f"\n{log}: {log.read_text()[-2000:]}" for log in sorted(self.folder.glob("slurm*.log")))


def _files_of(job: str) -> list[str]:
    return [*map(str, Path("/tmp").glob(f"astar-{job}-*")), *map(str, Path("/dev/shm").glob(f"sem.astar-{job}-*"))]


@contextlib.contextmanager
def two_node_slurm(folder: Path) -> Iterator[Slurm]:
    """Bring the cluster up, with its files in `folder`; the test is skipped where that can't be."""
    _skip_where_impossible()
    values = {"dir": folder, "first": 1000 + os.getpid() % 50000 * 100, **ADDRESSES}  # folders in /tmp have the number
    (folder / "slurm.conf").write_text(_CONF.format(**values))
    (folder / "cgroup.conf").write_text(_CGROUP)
    (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{ip} {name}\n" for name, ip in ADDRESSES.items()))
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    for name in ("state", "spool.node1", "spool.node2"):
        (folder / name).mkdir()
    script = _PREPARE.format(dir=folder, addresses=" ".join(ADDRESSES.values()))
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    command = [*_HOLD, "sh", "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as holder:
        try:
            assert holder.stdout and holder.stdout.readline() == "ready\n"
            first = int(Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text())
            slurm = Slurm(holder=first, folder=folder)
            until = time.monotonic() + 120
            while (idle := slurm.run("sinfo", "--noheader", "--states=idle", "--format=%D").strip()) != "2":
                assert time.monotonic() < until, f"{idle or 'no'} nodes are idle; {slurm.logs()}"
                time.sleep(0.2)
            yield slurm
        finally:
            holder.kill()


def _skip_where_impossible() -> None:
    if os.geteuid() != 0:
        pytest.skip("a Slurm in namespaces needs root")
    if missing := [name for name in _NEEDED if shutil.which(name) is None]:
        pytest.skip(f"needs {', '.join(missing)}: Debian's slurm-wlm, munge, iproute2, util-linux")
    tried = subprocess.run([*_HOLD, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"this machine allows no namespaces: {tried.stderr.strip()}")
