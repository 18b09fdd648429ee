"""The gloo transfer, between processes: two trainer ranks to two engines of two workers."""

import os
import subprocess
import sys
from pathlib import Path

from gloo_process import MODEL
from safetensors.torch import load_file
from tiny_models import assert_equal_worlds, empty_world, random_weights, reference_world

PROGRAM = Path(__file__).with_name("gloo_process.py")


def run(folder: Path, fault: str) -> None:
    settings = {"PYTHONPATH": str(PROGRAM.parents[2]), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, str(PROGRAM), str(folder), fault]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_weights_arrive_bitwise_at_every_worker_of_every_engine(tmp_path: Path) -> None:
    run(tmp_path, "none")
    assert not list(tmp_path.glob("*.error"))
    shapes = {rank: MODEL.vllm_shapes(2, rank) for rank in range(2)}
    expected = reference_world(MODEL.vllm_tiles(2), random_weights(MODEL), empty_world(shapes))
    for engine in range(2):
        got = {rank: load_file(tmp_path / f"{2 + 2 * engine + rank}.safetensors") for rank in range(2)}
        assert_equal_worlds(got, expected)


def test_a_late_sender_is_named_by_every_receiver(tmp_path: Path) -> None:
    run(tmp_path, "late")
    for rank in range(2, 6):
        assert "source rank 1 is late" in (tmp_path / f"{rank}.error").read_text()
