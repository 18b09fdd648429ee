"""Two Ray nodes on this machine that share folders and nothing else: network, /dev/shm and process numbers are apart.

Each lives in namespaces of its own, joined by a cable (a veth pair) and without any other network. All of it ends with
the process that holds the namespaces: the kernel kills what runs in them, and cable and mounts go with the last.
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ADDRESSES = ("10.231.14.1", "10.231.14.2")
INTERFACE = "cable"
_PORT = 6379
_HOLD = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--mount", "--pid", "--fork", "--kill-child"]
_PREPARE = "mount -t tmpfs -o size=2g tmpfs /dev/shm && ip link set lo up && echo ready && exec sleep infinity"
_RAY = Path(sys.executable).with_name("ray")
_OPTIONS = ["--num-cpus=2", "--num-gpus=0", "--object-store-memory=100000000", "--disable-usage-stats", "--block"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Nodes:
    """The nodes; `holders` are the first processes of each, `environment` is what a member of the cluster needs.

    `rays` are the `ray start` of each, which end with their node's raylet.
    """

    holders: tuple[int, int]
    environment: Mapping[str, str]
    rays: dict[int, subprocess.Popen[str]] = field(default_factory=dict)

    @property
    def address(self) -> str:
        return f"{ADDRESSES[0]}:{_PORT}"

    def begin(self, node: int, command: Sequence[str | Path], **options: Any) -> subprocess.Popen[str]:
        """Start a command on a node; `options` are Popen's."""
        enter = ["nsenter", "-t", str(self.holders[node]), "--net", "--mount", "--pid"]
        usual: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen([*enter, *map(str, command)], env=self.environment, **usual | options)

    def start_ray(self, node: int) -> None:
        """Start Ray on a node, and wait until it has joined; node 0 is the head."""
        head = ["--head", f"--port={_PORT}", "--include-dashboard=false", "--temp-dir=/dev/shm/ray"]
        role = [f"--address={self.address}"] if node else head
        command = [_RAY, "start", f"--node-ip-address={ADDRESSES[node]}", *role, *_OPTIONS]
        self.rays[node] = ray = self.begin(node, command, cwd="/")
        assert ray.stdout
        lines: list[str] = []
        for line in ray.stdout:
            lines.append(line)
            if "Ray runtime started" in line:
                return
        raise AssertionError("".join(lines))

    def stop_ray(self, node: int) -> None:
        """Kill what runs on a node, but for what holds its namespaces."""
        self.rays[node].kill()
        while pids := self.processes(node):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        self.rays[node].wait()

    def processes(self, node: int) -> set[int]:
        """The processes of a node, by their numbers outside, but for what holds its namespaces."""
        namespace = _pid_namespace(self.holders[node])
        pids = {int(path.name) for path in Path("/proc").glob("[0-9]*")}
        return {pid for pid in pids if pid != self.holders[node] and _pid_namespace(pid) == namespace}

    def kill(self, begun: subprocess.Popen[str], number: int) -> None:
        """Send a signal to a command that `begin` began, which is the child of what entered the namespaces."""
        for child in Path(f"/proc/{begun.pid}/task/{begun.pid}/children").read_text().split():
            os.kill(int(child), number)

    def run(
        self, *command: str | Path, node: int = 0, cwd: Path | None = None, seconds: float = 1500
    ) -> tuple[int, str]:
        """Return a command's exit status and output, when it has ended."""
        with self.begin(node, command, cwd=cwd) as process:
            try:
                out, _ = process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        return process.returncode, out


@contextlib.contextmanager
def two_nodes(*paths: Path, auth_mode: str = "token") -> Iterator[Nodes]:
    """A Ray cluster whose head is node 0; `paths` come first on the Python path of all its processes."""
    _skip_where_impossible()
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, [*paths, Path(__file__).parents[1]])),
        "HF_HUB_OFFLINE": "1",
        "RAY_AUTH_MODE": auth_mode,
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    with contextlib.ExitStack() as stack:
        nodes = Nodes(
            holders=(stack.enter_context(_namespaces()), stack.enter_context(_namespaces())), environment=environment
        )
        _join_by_cable(nodes)
        for node in (0, 1):
            nodes.start_ray(node)
            stack.callback(nodes.stop_ray, node)
        yield nodes


@contextlib.contextmanager
def _namespaces() -> Iterator[int]:
    """The first process of new namespaces; with it ends everything in them."""
    with subprocess.Popen([*_HOLD, "--mount-proc", "sh", "-c", _PREPARE], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout and holder.stdout.readline() == "ready\n"
            yield int(Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text())
        finally:
            holder.kill()


def _pid_namespace(pid: int) -> str:
    """That of a living process; nobody waits for those that have ended in a namespace."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        return "" if stat.rpartition(")")[2].split()[0] == "Z" else str(Path(f"/proc/{pid}/ns/pid").readlink())
    except OSError:
        return ""


def _join_by_cable(nodes: Nodes) -> None:
    first, second = nodes.holders
    _ip("link", "add", INTERFACE, "netns", str(first), "type", "veth", "peer", "name", INTERFACE, "netns", str(second))
    for node, address in enumerate(ADDRESSES):
        for arguments in (("addr", "add", f"{address}/24", "dev", INTERFACE), ("link", "set", INTERFACE, "up")):
            status, out = nodes.run("ip", *arguments, node=node, seconds=60)
            assert status == 0, out


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, timeout=60)


def _skip_where_impossible() -> None:
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    if missing := [name for name in ("ip", "nsenter", "setpriv", "unshare") if shutil.which(name) is None]:
        pytest.skip(f"network namespaces need {', '.join(missing)} (iproute2, util-linux)")
    tried = subprocess.run([*_HOLD, "--mount-proc", "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"this machine allows no namespaces: {tried.stderr.strip()}")
