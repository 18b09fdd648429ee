"""What holds for every way that weights go: they arrive bit by bit, in bounded memory, and a dead end is seen.

`make gpu-check` runs the marked cases, on tensors of GPUs; they need torch, and two GPUs for NCCL.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from transfer_process import BUCKET_BYTES, DIES_AT, LARGE_BUCKET_BYTES, PLAN, digest

from conversion.transfer import TransferError
from conversion.transfer.route import Route, Way

PROGRAM = Path(__file__).with_name("transfer_process.py")


def opened(way: Way, folder: Path) -> tuple[Route, Any]:
    """One sender, one engine of one worker; and the store, which must live as long."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    sizes = {"num_sources": 1, "num_engines": 1, "num_workers": 1, "bucket_bytes": BUCKET_BYTES}
    return Route(way=way, folder=str(folder), host="127.0.0.1", port=store.port, name="test", **sizes), store


@pytest.fixture(params=["shared memory", "gloo"])
def route(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Route]:
    opened_route, _store = opened(request.param, tmp_path)
    yield opened_route


def start(role: str, route: Route, folder: Path, fate: str, device: str = "cpu") -> subprocess.Popen[str]:
    """The other end, in a process of its own; it says "ready" once it has its end."""
    (folder / "route.json").write_text(json.dumps(dataclasses.asdict(route)))
    command = [sys.executable, str(PROGRAM), role, str(folder / "route.json"), fate, device]
    path = os.pathsep.join(filter(None, [str(PROGRAM.parents[2]), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def go_on(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def on_gpu(way: Way, sender: str, receiver: str) -> Any:
    num_gpus = 1 + max(int(device[-1]) for device in (sender, receiver) if device != "cpu")
    missing = not torch.cuda.is_available() or torch.cuda.device_count() < num_gpus
    marks = [pytest.mark.gpu, pytest.mark.skipif(missing, reason=f"needs {num_gpus} GPUs")]
    return pytest.param(way, sender, receiver, marks=marks, id=f"{way} {sender} {receiver}")


@pytest.mark.parametrize(
    ("way", "sender", "receiver"),
    [
        pytest.param("shared memory", "cpu", "cpu", id="shared memory"),
        pytest.param("gloo", "cpu", "cpu", id="gloo"),
        on_gpu("cuda ipc", "cuda:0", "cuda:0"),
        on_gpu("nccl", "cuda:0", "cuda:1"),
        on_gpu("shared memory", "cuda:0", "cuda:0"),
        on_gpu("gloo", "cuda:0", "cuda:0"),
    ],
)
def test_each_version_arrives_bit_by_bit(way: Way, sender: str, receiver: str, tmp_path: Path) -> None:
    route, _store = opened(way, tmp_path)
    tensor = torch.zeros(64, 16, device=sender)
    end = route.sender(PLAN, 0, {"a": tensor}, torch.float32)
    with start("receiver", route, tmp_path, "tells", receiver) as process:
        assert line_of(process) == "ready"
        for version in range(3):
            tensor.normal_()
            end.send(version)
            assert line_of(process) == digest(tensor)
            go_on(process)
    assert process.returncode == 0
    end.close()


def test_a_killed_receiver_is_named_long_before_the_deadline(route: Route, tmp_path: Path) -> None:
    sender: Any = route.sender(PLAN, 0, {"a": torch.ones(64, 16)}, torch.float32)
    pack, killed = sender._pack, 0.0

    def pack_and_kill(number: int) -> None:
        nonlocal killed
        if number == DIES_AT:
            os.kill(process.pid, 9)
            process.wait()
            killed = time.monotonic()
        pack(number)

    sender._pack = pack_and_kill
    with pytest.raises(TransferError) as caught, start("receiver", route, tmp_path, "lives") as process:
        assert line_of(process) == "ready"
        sender.send()
    assert time.monotonic() - killed < route.timeout_seconds / 10
    assert re.search(r"worker 0 of engine 0 .*(has ended|can not be reached)", str(caught.value))
    sender.close()


def test_a_killed_sender_is_named_long_before_the_deadline(route: Route, tmp_path: Path) -> None:
    with start("sender", route, tmp_path, "dies") as process:
        assert line_of(process) == "ready"
        receiver = route.receiver(PLAN, 0, {"b": torch.zeros(64, 16)}, torch.float32)
        begun = time.monotonic()
        with pytest.raises(TransferError, match=r"source rank 0 .*ended"):
            receiver.receive()
        assert time.monotonic() - begun < route.timeout_seconds / 10
    assert process.returncode == -9
    receiver.close()


def test_no_process_grows_by_more_than_two_buckets(route: Route, tmp_path: Path) -> None:
    """Measured from outside what the code says of itself, with an embedding of six buckets."""
    route = dataclasses.replace(route, bucket_bytes=LARGE_BUCKET_BYTES)
    ends = [start(role, route, tmp_path, "measures") for role in ("sender", "receiver")]
    assert [line_of(end) for end in ends] == ["ready", "ready"]
    for end in ends:
        go_on(end)
    for end in ends:
        grown = json.loads(line_of(end))["grown"]
        assert LARGE_BUCKET_BYTES < grown < 3 * LARGE_BUCKET_BYTES  # with code, sockets, plans: no third bucket
    for end in ends:
        end.communicate("\n")
        assert end.returncode == 0
