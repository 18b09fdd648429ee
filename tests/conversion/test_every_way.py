"""What holds for every way that weights go: an end that is killed is seen within seconds, and memory stays bounded."""

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
from transfer_process import BUCKET_BYTES, DIES_AT, LARGE_BUCKET_BYTES, PLAN

from conversion.transfer import TransferError
from conversion.transfer.route import Route, Way

PROGRAM = Path(__file__).with_name("transfer_process.py")


@pytest.fixture(params=["shared memory", "gloo"])
def route(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Route]:
    """One sender, one engine of one worker."""
    way: Way = request.param
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield Route(
        way=way,
        num_sources=1,
        num_engines=1,
        num_workers=1,
        folder=str(tmp_path),
        host="127.0.0.1",
        port=store.port,
        name="test",
        bucket_bytes=BUCKET_BYTES,
    )


def start(role: str, route: Route, folder: Path, fate: str) -> subprocess.Popen[str]:
    """The other end, in a process of its own."""
    (folder / "route.json").write_text(json.dumps(dataclasses.asdict(route)))
    command = [sys.executable, str(PROGRAM), role, str(folder / "route.json"), fate]
    environment = os.environ | {"PYTHONPATH": str(PROGRAM.parents[2]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def test_a_killed_receiver_is_named_within_seconds(route: Route, tmp_path: Path) -> None:
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
        sender.send()
    assert time.monotonic() - killed < 10  # the deadline is two minutes
    assert re.search(r"worker 0 of engine 0 .*(has ended|can not be reached)", str(caught.value))
    sender.close()


def test_a_killed_sender_is_named_within_seconds(route: Route, tmp_path: Path) -> None:
    with start("sender", route, tmp_path, "dies") as process:
        receiver = route.receiver(PLAN, 0, {"b": torch.zeros(64, 16)}, torch.float32)
        begun = time.monotonic()
        with pytest.raises(TransferError, match=r"source rank 0 .*ended"):
            receiver.receive()
        assert time.monotonic() - begun < 10
    assert process.returncode == -9
    receiver.close()


def test_no_process_grows_by_more_than_two_buckets(route: Route, tmp_path: Path) -> None:
    """Measured from outside what the code says of itself, with an embedding of six buckets."""
    route = dataclasses.replace(route, bucket_bytes=LARGE_BUCKET_BYTES)
    ends = [start(role, route, tmp_path, "measures") for role in ("sender", "receiver")]
    for end in ends:
        assert end.stdout is not None
        grown = json.loads(end.stdout.readline())["grown"]
        assert LARGE_BUCKET_BYTES < grown < 2 * LARGE_BUCKET_BYTES + (6 << 20)  # 6 MiB: code, sockets, plans
    for end in ends:
        end.communicate("\n")
        assert end.returncode == 0
