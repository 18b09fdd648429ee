"""What is said when a real engine ends, by whom, and what its processes leave behind."""

import os
import shutil
import signal
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from drawing import drawn

from astar_megatron import config
from astar_megatron.cluster import session
from astar_megatron.cluster.errors import ClusterError
from astar_megatron.cluster.processes import process_tree
from astar_megatron.rollout.pool import EnginePool
from astar_megatron.run.fleet import cluster_of, start_engines
from astar_megatron.types import Prompt

PROMPT = Prompt(uid="p", token_ids=tuple(range(3, 33)), text="", answer="")


def vllm_process(name: str) -> int:
    """The process of this one's descendants that vLLM calls by `name`."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if title.startswith(name) and int(folder.name) in process_tree(os.getpid()):
            return int(folder.name)
    raise AssertionError(f"no process {name}")


def kill_and_draw(engines: EnginePool, cfg: config.RunConfig, name: str) -> None:
    drawn(engines, PROMPT, cfg.sampling)
    os.kill(vllm_process(name), signal.SIGKILL)
    with pytest.raises(ConnectionError):
        for seed in range(1, 1000):  # the first may be answered before the end is seen
            drawn(engines, PROMPT, cfg.sampling, seeds=[seed])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tensor", "killed", "words"),
    [
        (1, "VLLM::EngineCore", "EngineCore was killed by SIGKILL"),
        (2, "VLLM::Worker_TP1", "died unexpectedly (exit code: -9)"),
        (1, "ray::Engine", "was killed (SIGKILL)"),
    ],
)
def test_a_killed_process_of_an_engine_is_named_and_leaves_no_shared_memory(
    run_tree: Any, tied_llama: Path, tensor: int, killed: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = {path.name for path in Path("/dev/shm").iterdir()}
    tree = run_tree(tied_llama)
    tree["rollout"]["tensor"] = tensor
    cfg = config.validate(tree)
    with cluster_of(cfg, with_policy=False) as cluster, closing(start_engines(cfg, cluster)) as engines:
        engines.start()
        names = set(session.shared_files(os.getpid())) - before
        assert any(name.startswith("sem.astar-") for name in names)
        kill_and_draw(engines, cfg, killed)
    line = next(message for message in caplog.messages if message.startswith("engine 0: "))
    assert words in line and line.endswith("; it is being replaced")
    assert not names & {path.name for path in Path("/dev/shm").iterdir()}


@pytest.mark.slow
def test_a_failed_start_ends_with_the_error_of_the_engine_s_own_process(
    run_tree: Any, tied_llama: Path, tmp_path: Path
) -> None:
    cfg = config.validate(run_tree(tied_llama))
    shutil.copytree(tied_llama, folder := tmp_path / "no_weights")
    for path in folder.glob("*.safetensors"):
        path.unlink()
    with (
        pytest.raises(ClusterError, match="Engine core initialization failed") as caught,
        cluster_of(cfg, with_policy=False) as cluster,
    ):
        start_engines(cfg, cluster, str(folder)).start()
    assert str(caught.value).splitlines()[-1].startswith("engine 0: RuntimeError: Cannot find any model weights")
