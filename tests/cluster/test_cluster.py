"""Actors that fail, hang or end are named at once (real Ray)."""

import contextlib
import ctypes
import importlib
import os
import re
import signal
import socket
import stat
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from astar_megatron.cluster.cluster import Cluster
from astar_megatron.cluster.errors import ActorLost, ClusterError
from astar_megatron.cluster.processes import tree
from astar_megatron.cluster.stacks import show_on_signal
from astar_megatron.config import ClusterConfig


class Worker:
    """Does as it is told."""

    def __init__(self) -> None:
        show_on_signal()

    def obey(self, order: str) -> str:
        if order == "hang":
            time.sleep(600)
        if order == "folder":
            return os.environ["TMPDIR"]
        if order == "pid":
            return str(os.getpid())
        if order == "start":
            sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
            return str(subprocess.Popen(sleep, start_new_session=True).pid)  # of one in its own Ray ends it too
        if order == "end":
            os._exit(3)
        if order == "end later":
            time.sleep(0.3)
            os._exit(3)
        if order == "leave":
            sys.exit(4)
        if order == "crash":
            ctypes.string_at(0)
        if order == "tell":
            print("RuntimeError: Unable to find address for: nope0", file=sys.stderr, flush=True)
            os._exit(1)
        if order == "point":
            print("(Core pid=7) ERROR 11-28 00:24:04 [core.py:1510] OSError: no space left for the cache", flush=True)
            raise RuntimeError("Engine core initialization failed. See root cause above.")
        if order == "fail":
            raise RuntimeError("Engine core initialization failed. Failed core proc(s): {'EngineCore': 1}")
        if order == "fail without a word":
            raise RuntimeError("Engine core initialization failed. Failed core proc(s): {}")
        if order == "refuse":
            raise ValueError("data.path: no such file")
        if order == "break":
            raise KeyError("weights")
        if order in ("conversion", "statistics"):
            return str(importlib.import_module(order).__file__)
        return order


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Started in a folder with modules that have the names of ours and of Python's."""
    folder = tmp_path_factory.mktemp("here")
    for name in ("conversion", "statistics"):
        (folder / f"{name}.py").write_text("")
    with contextlib.chdir(folder), Cluster(ClusterConfig()) as cluster:
        assert Path.cwd() == folder
        yield cluster


@pytest.fixture
def workers(cluster: Cluster) -> list[Any]:
    env = {"PYTHONPATH": os.pathsep.join(str(Path(__file__).parents[level]) for level in (0, 2))}
    both = [cluster.actor("worker", index, Worker, env=env) for index in range(2)]
    cluster.wait("start", [worker.obey.remote("") for worker in both], 60)
    return both


def test_results_come_in_the_order_of_the_calls(cluster: Cluster, workers: list[Any]) -> None:
    assert cluster.wait("work", [w.obey.remote(str(i)) for i, w in enumerate(workers)], 60) == ["0", "1"]


def test_nobody_else_can_enter_the_sessions_folder(cluster: Cluster, workers: list[Any]) -> None:
    (folder,) = cluster.wait("work", [workers[0].obey.remote("folder")], 60)
    assert stat.S_IMODE(Path(folder).stat().st_mode) == 0o700


def test_what_lies_where_a_run_is_started_takes_no_modules_place_in_its_workers(
    cluster: Cluster, workers: list[Any]
) -> None:
    ours, pythons = cluster.wait("work", [workers[0].obey.remote(name) for name in ("conversion", "statistics")], 60)
    assert ours == str(Path(__file__).parents[2] / "conversion/__init__.py")
    assert pythons == statistics.__file__


def test_a_failure_ends_the_wait_although_another_rank_hangs(cluster: Cluster, workers: list[Any]) -> None:
    calls = [workers[0].obey.remote("hang"), workers[1].obey.remote("break")]
    with pytest.raises(ClusterError, match=r"(?s)work: .*weights.*output of its processes lies in"):
        cluster.wait("work", calls, 60)


def test_a_wrong_input_that_only_the_actor_could_see_keeps_its_message(cluster: Cluster, workers: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"^data\.path: no such file$"):
        cluster.wait("work", [workers[0].obey.remote("refuse")], 60)


@pytest.mark.parametrize(
    ("order", "end"),
    [
        ("end", r"was killed \(SIGKILL\), or ended itself at once: it left no word"),
        ("leave", "ended with exit status 4"),
        ("crash", r"(\*\*\* SIGSEGV received|Fatal Python error: Segmentation fault).*"),
        ("tell", r"was killed .*; the last error before: RuntimeError: Unable to find address for: nope0"),
        ("point", "OSError: no space left for the cache"),
    ],
)
def test_a_failure_ends_with_its_cause_in_one_line(cluster: Cluster, workers: list[Any], order: str, end: str) -> None:
    with pytest.raises(ClusterError) as caught:
        cluster.wait("work", [workers[1].obey.remote(order)], 60)
    assert str(caught.value).startswith("work: worker 1: ")
    assert re.fullmatch(f"worker 1: {end}", str(caught.value).splitlines()[-1])


def test_who_died_is_blamed_and_not_who_heard_of_it(cluster: Cluster, workers: list[Any]) -> None:
    calls = [workers[0].obey.remote("break"), workers[1].obey.remote("end later")]
    with pytest.raises(ActorLost, match=r"^work: worker 1: the process ended") as caught:
        cluster.wait("work", calls, 60)
    assert (caught.value.kind, caught.value.index) == ("worker", 1)


def test_a_hanging_actor_runs_into_its_deadline_and_is_named_with_where_it_hangs(
    cluster: Cluster, workers: list[Any]
) -> None:
    calls = [workers[0].obey.remote(""), workers[1].obey.remote("hang")]
    with pytest.raises(ActorLost, match=r"work: no answer in 2 s; raise cluster\.start_timeout_seconds") as caught:
        cluster.wait("work", calls, 2)
    assert (caught.value.kind, caught.value.index) == ("worker", 1)
    last = str(caught.value).splitlines()[-1]
    assert re.fullmatch(r"worker 1: no answer in 2 s; process \d+ is at test_cluster\.py:\d+ obey < .*", last)


def test_a_deadline_is_that_of_the_configuration_unless_another_is_given(cluster: Cluster, workers: list[Any]) -> None:
    assert cluster._cfg.call_timeout_seconds == 3600.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "_cfg", ClusterConfig(call_timeout_seconds=1.0))
        with pytest.raises(ActorLost, match=r"work: no answer in 1 s; raise cluster\.call_timeout_seconds"):
            cluster.wait("work", [workers[0].obey.remote("hang")])


def test_an_actor_that_is_stopped_is_named_so_and_ends_with_all_that_it_has_started(
    cluster: Cluster, workers: list[Any]
) -> None:
    (child,) = cluster.wait("work", [workers[0].obey.remote("start")], 60)
    (pid,) = cluster.wait("work", [workers[0].obey.remote("pid")], 60)
    cluster.remember_processes(workers)
    for process in (pid, child):
        os.kill(int(process), signal.SIGSTOP)
    with pytest.raises(ActorLost, match=r"worker 0: no answer in 1 s; .*process \d+ is stopped \(SIGSTOP\)"):
        cluster.wait("work", [workers[0].obey.remote("")], 1)
    os.kill(int(pid), signal.SIGKILL)  # its child stays, and is stopped
    cluster.end(workers[:1])
    wait_until_gone(int(child))
    with pytest.raises(ActorLost, match="worker 0: the process ended"):
        cluster.wait("work", [workers[0].obey.remote("")], 60)


def wait_until_gone(pid: int) -> None:
    until = time.monotonic() + 60
    while not is_gone(pid):
        assert time.monotonic() < until
        time.sleep(0.01)


def is_gone(pid: int) -> bool:
    return not tree(pid) or Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


JOIN = """
import os, sys
from astar_megatron.cluster.cluster import Cluster
from astar_megatron.cluster.placement import place
from astar_megatron.config import ClusterConfig, ParallelConfig, RolloutConfig
from astar_megatron.model.backend import environment
class Where:
    def gpus(self): return os.environ["CUDA_VISIBLE_DEVICES"]
def started(cluster):
    seats = (*cluster.reservation.placement.ranks, *cluster.reservation.placement.engines)
    for index, seat in enumerate(seats):
        env = environment(gpus=seat.gpus, threads=1, num_nodes=1, dtype="float32")
        yield cluster.actor("where", index, Where, env=env, seat=seat)
with Cluster(ClusterConfig(address=sys.argv[1], start_timeout_seconds=120)) as cluster:
    share_gpus = sys.argv[2] == "shared"
    cluster.reserve(place(cluster.nodes.values(), ParallelConfig(data=3), RolloutConfig(tensor=2), share_gpus))
    print(cluster.num_gpus, cluster.wait("where", [actor.gpus.remote() for actor in started(cluster)], 120))
"""


FULL = """
from test_cluster import Worker
from astar_megatron.cluster.cluster import Cluster
from astar_megatron.cluster.errors import ActorLost
from astar_megatron.config import ClusterConfig
with Cluster(ClusterConfig()) as cluster:
    worker = cluster.actor("worker", 0, Worker, env={})
    try:
        cluster.wait("work", [worker.obey.remote("hang")], 120)
    except ActorLost as error:
        print(str(error).splitlines()[-1])
"""


def test_a_process_that_ray_ends_for_memory_is_named_with_the_reason() -> None:
    folders = [str(Path(__file__).parents[level]) for level in (0, 2)]
    limits = {"RAY_memory_usage_threshold": "0.01", "RAY_memory_monitor_refresh_ms": "100"}
    env = os.environ | limits | {"PYTHONPATH": os.pathsep.join(folders)}
    done = subprocess.run([sys.executable, "-c", FULL], env=env, capture_output=True, text=True, timeout=300)
    assert re.fullmatch(
        r"worker 0: Ray ended it, as \S+GB of the machine's \S+GB of memory were used; .*\n", done.stdout
    ), done.stdout + done.stderr


def test_a_cluster_that_runs_already_is_joined() -> None:
    """With the token authentication that `ray start` turns on by itself; this run's end leaves it running.

    Each actor sees the GPUs of its seat, of which Ray only knows the number, shared ones too.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    from samples import output_of  # here: Ray's workers import this file, and have no tests on their path

    ray_command = str(Path(sys.executable).with_name("ray"))
    options = [f"--port={port}", "--include-dashboard=false", "--block", "--num-cpus=1", "--num-gpus=5"]
    with subprocess.Popen(
        [ray_command, "start", "--head", *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as head:
        try:
            assert head.stdout
            assert any("Ray runtime started" in line for line in head.stdout)
            apart, shared = (output_of(JOIN, f"127.0.0.1:{port}", share) for share in ("apart", "shared"))
            assert apart.splitlines() == ["5 ['0', '1', '2', '3,4']"]
            assert shared.splitlines() == ["5 ['0', '1', '2', '0,1']"]
        finally:
            head.terminate()
            head.communicate(timeout=60)
