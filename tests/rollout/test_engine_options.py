"""What an engine is told: graphs by key or by device, the head's type, the log. vLLM itself reads the arguments."""

import asyncio
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from astar_megatron.config import RolloutConfig, SamplingConfig
from astar_megatron.rollout.engine import (
    CPU_HEAD_SIZES,
    Engine,
    EngineOptions,
    Response,
    check_graphs,
    check_head_size,
    engine_arguments,
    environment,
    graphs_of,
)
from astar_megatron.rollout.start_log import PHASES, StartLog
from astar_megatron.types import Prompt, Request


def options(*, on_gpu: bool, model_path: str = "m", **rollout: Any) -> EngineOptions:
    return EngineOptions(
        model_path=model_path,
        dtype="bfloat16",
        max_tokens=512,
        stop_token_ids=(2,),
        seed=0,
        rollout=RolloutConfig(**rollout),
        on_gpu=on_gpu,
    )


def test_the_default_is_by_device_and_says_so() -> None:
    on_gpu, on_cpu = (graphs_of(RolloutConfig(), on_gpu=on_gpu) for on_gpu in (True, False))
    assert on_gpu[0] == "decode" and "decode by default, on a GPU" in on_gpu[1]
    assert on_cpu[0] == "none" and "none by default, on a CPU" in on_cpu[1]


def test_the_key_wins_and_says_so() -> None:
    for on_gpu in (True, False):
        graphs, words = graphs_of(RolloutConfig(graphs="compiled"), on_gpu=on_gpu)
        assert graphs == "compiled" and words.endswith("(rollout.graphs=compiled)")


def test_decode_graphs_without_a_gpu_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"^rollout\.graphs=decode: .*none is here; leave the key out, or set none"):
        check_graphs(RolloutConfig(graphs="decode"), on_gpu=False)
    check_graphs(RolloutConfig(graphs="decode"), on_gpu=True)
    check_graphs(RolloutConfig(), on_gpu=False)


def test_the_head_sizes_of_a_cpu_are_those_of_vllm() -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    assert list(CPU_HEAD_SIZES) == CPUAttentionBackend.get_supported_head_sizes()


def test_heads_that_an_engine_lacks_are_refused_on_a_cpu_alone() -> None:
    check_head_size(48, on_gpu=True)
    check_head_size(256, on_gpu=False)
    with pytest.raises(ValueError, match=r"have 48 numbers each.* of 32, 64, 80.*, or a machine with a GPU"):
        check_head_size(48, on_gpu=False)


def test_an_engine_in_float32_on_gpus_multiplies_in_float32() -> None:
    def of(dtype: str, gpus: list[str]) -> dict[str, str]:
        return environment(RolloutConfig(), gpus=gpus, threads=1, dtype=dtype, socket_folder=None)

    assert of("float32", ["0"])["TRITON_F32_DEFAULT"] == "ieee"  # triton's own word
    assert "TRITON_F32_DEFAULT" not in of("bfloat16", ["0"]) | of("float32", [])


def test_threads_of_an_engine_are_bound_by_vllm_or_not_at_all() -> None:
    """vLLM binds those of several workers, each to its own cores, where there is no GPU."""

    def of(tensor: int, gpus: list[str]) -> dict[str, str]:
        return environment(RolloutConfig(tensor=tensor), gpus=gpus, threads=1, dtype="bfloat16", socket_folder=None)

    assert of(1, [])["OMP_PROC_BIND"] == of(2, ["0", "1"])["OMP_PROC_BIND"] == "false"
    assert "OMP_PROC_BIND" not in of(2, [])


PROGRAM = """
import json, sys
from vllm import AsyncEngineArgs
from vllm.config.compilation import CompilationMode
from vllm.config.logging import LoggingConfig
from vllm.logger import configure_logging, init_logger
found = []
for arguments in json.load(sys.stdin):
    args = AsyncEngineArgs(**arguments)
    mode, graphs = args.compilation_config.mode, args.compilation_config.cudagraph_mode
    mode = None if mode is None else CompilationMode(mode).name
    found.append([args.enforce_eager, mode, graphs and graphs.name, args.hf_overrides])
print(json.dumps(found))
configure_logging(LoggingConfig())  # as an engine does, and the processes that it starts
logger = init_logger("vllm.anything")
logger.info("Starting to load model %s", "m")
logger.error("no such thing")
logger.info("Initial profiling/warmup run took\\n3 s")
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], StartLog, str]:
    """What vLLM reads of the arguments, its log, and what it wrote on stderr; one process, for its imports are slow."""
    pytest.importorskip("vllm")
    folder = tmp_path_factory.mktemp("engine")
    log = StartLog.make(folder, "engine-0")
    assert log.phase(has_graphs=True) == "starting its process"
    model = str(folder)  # there is such a folder: nothing more is looked for yet
    cases = [options(on_gpu=True, model_path=model, graphs=graphs) for graphs in ("none", "decode", "compiled", None)]
    text = json.dumps([engine_arguments(case) for case in [*cases, options(on_gpu=False, model_path=model)]])
    env = os.environ | log.environment() | {"VLLM_LOGGING_LEVEL": "ERROR"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, input=text, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), log, done.stderr


def test_vllm_reads_the_arguments_as_they_are_meant(told: tuple[list[Any], StartLog, str]) -> None:
    head = {"head_dtype": "float32"}
    assert told[0] == [
        [True, None, None, head],
        [False, "NONE", "FULL_DECODE_ONLY", head],
        [False, None, None, head],
        [False, "NONE", "FULL_DECODE_ONLY", head],
        [True, None, None, {}],
    ]


def test_the_phase_is_that_of_the_last_message_that_begins_one(told: tuple[list[Any], StartLog, str]) -> None:
    _, log, errors = told
    assert log.phase(has_graphs=True) == "measuring its memory"
    assert "Starting to load model m" in log.log.read_text()
    assert "no such thing" in errors and "Starting to load" not in errors


@pytest.mark.parametrize(("has_graphs", "phase"), [(True, "capturing graphs"), (False, "warming up")])
def test_when_its_cache_is_made_an_engine_captures_graphs_or_warms_up(
    tmp_path: Path, has_graphs: bool, phase: str
) -> None:
    log = StartLog.make(tmp_path, "engine-0")
    lines = ["Starting to load model m...", "CPU KV cache size: 297,624 tokens, Maximum", "Enabled custom fusions: x"]
    log.log.write_text("".join(f"2026-01-01 00:00:00,000\tINFO\t{line}\n" for line in lines))
    assert log.phase(has_graphs=has_graphs) == phase


def test_the_installed_vllm_has_each_message_that_begins_a_phase() -> None:
    vllm = importlib.util.find_spec("vllm")
    if vllm is None or not vllm.submodule_search_locations:
        pytest.skip("needs vllm")
    folder = Path(vllm.submodule_search_locations[0])
    text = "".join(path.read_text() for room in ("v1", "compilation") for path in (folder / room).rglob("*.py"))
    assert [message for message in PHASES if message not in text] == []


@pytest.mark.parametrize(
    ("reason", "truncated"), [("stop", False), ("length", True), ("abort", None), ("repetition", None), (None, None)]
)
def test_a_response_that_neither_a_stop_token_nor_the_limit_ended_is_refused(
    reason: str | None, truncated: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    completion = SimpleNamespace(token_ids=[5], logprobs=[{5: SimpleNamespace(logprob=-1.0)}], finish_reason=reason)

    async def generate(*_: object) -> AsyncIterator[Any]:
        yield SimpleNamespace(outputs=[completion])

    sampling: Any = SimpleNamespace(SamplingParams=dict, RequestOutputKind=SimpleNamespace(FINAL_ONLY=None))
    monkeypatch.setitem(sys.modules, "vllm", sampling)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", sampling)
    engine = Engine(options(on_gpu=False))
    engine._llm = SimpleNamespace(generate=generate)  # pyright: ignore[reportPrivateUsage]

    async def draw() -> list[Response]:
        request = Request(prompt=Prompt(uid="u", token_ids=(1,), text="x", answer="y"), sample=0, seed=0)
        return [response async for some in engine.generate([(0, request)], SamplingConfig()) for response in some]

    if truncated is None:
        with pytest.raises(RuntimeError, match=f"finish_reason={reason!r}, expected 'stop' or 'length'"):
            asyncio.run(draw())
    else:
        assert [response.truncated for response in asyncio.run(draw())] == [truncated]
