"""Transfers through a process group, between processes: two policy replicas to two engines of two workers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from group_process import BUCKET_BYTES, MODEL, PLAN
from safetensors.torch import load_file
from tiny_models import assert_equal_worlds, empty_world, random_weights, reference_world

from conversion.transfer.buckets import ALIGNMENT_BYTES, schedule, wanted
from conversion.transfer.process_group import World

PROGRAM = Path(__file__).with_name("group_process.py")


def run(folder: Path, fault: str) -> None:
    settings = {"PYTHONPATH": str(PROGRAM.parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(PROGRAM), str(folder), fault]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_weights_arrive_bitwise_and_nobody_is_sent_what_it_does_not_want(tmp_path: Path) -> None:
    run(tmp_path, "none")
    assert [path.read_text() for path in tmp_path.glob("*.error")] == []
    shapes = {rank: MODEL.vllm_shapes(2, rank) for rank in range(2)}
    expected = reference_world(MODEL.vllm_tiles(2), random_weights(MODEL), empty_world(shapes))
    for engine in range(2):
        received = {rank: load_file(tmp_path / f"{2 + 2 * engine + rank}.safetensors") for rank in range(2)}
        assert_equal_worlds(received, expected)
    counted = [json.loads((tmp_path / f"{number}.json").read_text()) for number in range(6)]
    assert all(0 < count["held"] <= 2 * BUCKET_BYTES for count in counted)
    assert all(count["packed"] > 10 * BUCKET_BYTES for count in counted[:2])  # many more buckets than buffers
    assert sum(count["sent"] for count in counted[:2]) == sum(count["received"] for count in counted[2:])
    assert max(count["sent"] for count in counted[:2]) < 0.6 * sum(count["sent"] for count in counted[:2])
    versions = 2
    for number, count in enumerate(counted[2:]):
        copies = PLAN.to_rank(number % 2)
        needed = sum(4 * copy.target.num_elements for copy in copies)
        messages = 8 * len({copy.source.rank for copy in copies})  # the version, once a source rank
        assert versions * needed <= count["received"] <= versions * (needed + messages + ALIGNMENT_BYTES * len(copies))


def test_whoever_wants_something_of_a_message_wants_all_of_it() -> None:
    for source in range(2):
        for size in (300, BUCKET_BYTES, 1 << 20):
            order = schedule(PLAN, source, 4, size, apart=True)
            assert sum(f.num_elements for bucket in order.buckets for f in bucket) == sum(
                f.num_elements for bucket in schedule(PLAN, source, 4, size).buckets for f in bucket
            )
            assert max(order.sizes) <= size
            for target in range(2):
                for number, taken in wanted(PLAN, order, source, target).items():
                    assert len(taken) == len(order.buckets[number])


def test_a_late_sender_is_named_by_who_waits_for_it_and_everyone_ends(tmp_path: Path) -> None:
    run(tmp_path, "late")
    errors = [(tmp_path / f"{number}.error").read_text() for number in (0, *range(2, 6))]
    assert any("source rank 1 is late" in error for error in errors)
    assert all("is late" in error or "ended" in error or "reached" in error for error in errors)


def test_a_connection_that_breaks_is_not_said_to_be_late(tmp_path: Path) -> None:
    """Whoever was connected to the ended process names it; the others name who gave up before them, and say so."""
    run(tmp_path, "ended")
    errors = {path.stem: path.read_text() for path in tmp_path.glob("*.error")}
    assert any("exchange with source rank 1 broke after" in error for error in errors.values())
    for error in errors.values():
        assert "has ended or given up" in error or "can not be reached" in error
        assert "is late" not in error and "60 s" not in error


def test_a_worker_that_the_group_does_not_have_is_named() -> None:
    world = World(way="nccl", host="h", port=1, name="n", num_sources=3, num_engines=2, num_workers=4)
    with pytest.raises(ValueError, match="worker 4 of engine 0: the group has 2 engines of 4"):
        world.worker(0, 4)
