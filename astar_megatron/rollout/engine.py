"""One vLLM engine: AsyncLLM inside a Ray actor, updated in place through vLLM's own weight-transfer API.

Requests name their own seed, so any subset of them reproduces whatever else runs beside it.
"""

import asyncio
import contextlib
import importlib.util
import itertools
import multiprocessing.connection
import os
import runpy
import sys
import threading
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from astar_megatron.cluster.endings import ended
from astar_megatron.cluster.stacks import show_on_signal
from astar_megatron.config import Graphs, RolloutConfig, SamplingConfig
from astar_megatron.types import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """What an engine drew; but for `tag`, the number of its request, the fields are as in Rollout."""

    tag: int
    token_ids: tuple[int, ...]
    truncated: bool
    token_logprobs: tuple[float, ...]
    first_version: int
    last_version: int
    tokens_by_version: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """What every engine of a pool has in common.

    `max_tokens` are of prompt and response; `sleep` says that `Engine.sleep` will be called.
    """

    model_path: str
    dtype: str
    max_tokens: int
    stop_token_ids: tuple[int, ...]
    seed: int
    rollout: RolloutConfig
    on_gpu: bool
    sleep: bool = False


class Engine:
    """An AsyncLLM with the weights of `model_path` until the first update. Wrapped by pool.py as an async Ray actor."""

    def __init__(self, options: EngineOptions) -> None:
        show_on_signal()
        self._options = options
        self._version = 0
        self._count = 0
        self._llm: Any = None
        self._tasks: set[asyncio.Task[Response]] = set()  # of requests in flight
        self._in_flight: dict[str, list[int]] = {}  # by request: how many tokens it had at each update that it met

    async def start(self) -> list[str]:
        """Load the model; returns when the engine can generate: which environment variables it left out, and why."""
        left_out = leave_out_unreadable()
        from vllm import AsyncEngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = AsyncEngineArgs(**engine_arguments(self._options))
        # As many tokens a pass as vLLM's offline engine takes, 16,384 on an H100; AsyncLLM's own default is 2,048.
        self._llm = AsyncLLM.from_engine_args(arguments, usage_context=UsageContext.LLM_CLASS)
        manager = self._llm.engine_core.resources.engine_manager
        threading.Thread(target=_tell_ends, args=(list(manager.processes),), daemon=True).start()
        return left_out

    async def generate(
        self, requests: Sequence[tuple[int, Request]], sampling: SamplingConfig
    ) -> AsyncIterator[list[Response]]:
        """Yield the responses to (tag, request) pairs as they finish, a few at a time; each is answered once."""
        finished: asyncio.Queue[asyncio.Task[Response]] = asyncio.Queue()  # asyncio.wait would look at all, each time
        tasks = [asyncio.create_task(self._respond(tag, request, sampling)) for tag, request in requests]
        self._tasks |= set(tasks)
        for task in tasks:
            task.add_done_callback(finished.put_nowait)
            task.add_done_callback(self._tasks.discard)
        left = len(tasks)
        try:
            while left:
                done = [await finished.get()]
                if left > 1:
                    await asyncio.sleep(0.05)  # what ends in the same step of the engine travels together
                while not finished.empty():
                    done.append(finished.get_nowait())
                left -= len(done)
                yield [task.result() for task in done if not task.cancelled()]
        finally:
            for task in tasks:
                task.cancel()

    async def _respond(self, tag: int, request: Request, sampling: SamplingConfig) -> Response:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0.0 if request.greedy else sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_response_tokens,
            seed=request.seed,
            stop_token_ids=list(self._options.stop_token_ids),
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self._count += 1
        first_version = self._version
        prompt = {"prompt_token_ids": list(request.prompt.token_ids)}
        name = str(self._count)
        before = self._in_flight[name] = []
        try:
            outputs = [output async for output in self._llm.generate(prompt, params, name)]
        finally:
            del self._in_flight[name]
        completion = outputs[-1].outputs[0]
        token_ids = tuple(completion.token_ids)
        bounds = [0, *before, len(token_ids)]
        return Response(
            tag=tag,
            token_ids=token_ids,
            truncated=_was_cut(completion.finish_reason),
            token_logprobs=tuple(row[token].logprob for token, row in zip(token_ids, completion.logprobs, strict=True)),
            first_version=first_version,
            last_version=first_version + len(before),
            tokens_by_version=tuple(end - start for start, end in itertools.pairwise(bounds)),
        )

    async def beat(self) -> None:
        """Answer, where this process and vLLM's core are well; raises what ended the core."""
        await self._llm.check_health()
        await self._llm.is_sleeping()  # the cheapest question that the core itself answers

    async def open_update(self, init_info: dict[str, Any]) -> None:
        """Prepare for updates; `init_info` is of conversion.vllm."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=init_info))

    async def update(self, version: int) -> None:
        """Take over the weights that the policy sends meanwhile, in this order and no other.

        Requests in flight freeze and go on with the new weights; the prefix cache, which vLLM does not reset by
        itself, is dropped. After a failed update the engine is half loaded and must draw nothing until one succeeds.
        """
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self._llm.pause_generation(mode="keep", clear_cache=True)
        await self._llm.start_weight_update()
        await self._llm.update_weights(WeightTransferUpdateRequest(update_info={"version": version}))
        await self._llm.finish_weight_update(weight_version=str(version))
        assert not self._in_flight or version == self._version + 1, (self._version, version)
        for name, before in self._in_flight.items():
            before.append(self._num_tokens(name))
        self._version = version
        await self._llm.resume_generation()

    async def drop_requests(self) -> None:
        """End what is being drawn, without an answer; returns when nothing is in flight."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _num_tokens(self, name: str) -> int:
        """How many tokens a request in flight has; exact while generation is paused."""
        processor = self._llm.output_processor
        states = [processor.request_states[internal] for internal in processor.external_req_ids.get(name, ())]
        return states[0].detokenizer.num_output_tokens() if states else 0  # else it has not reached vLLM yet

    async def sleep(self) -> int:
        """Give the memory of weights, keys and values back, and return its bytes; no request may be in flight.

        The weights are lost: after `wake("weights")` they must be published before `wake("kv_cache")` lets requests in.
        On a CPU, where vLLM has no sleep of its own, keys and values alone go.
        """
        assert not self._in_flight, self._in_flight.keys()
        if not self._options.on_gpu:
            await self._llm.pause_generation(mode="wait", clear_cache=True)
            return sum(await self._llm.collective_rpc("drop_cache"))
        before = await self._llm.collective_rpc("free_bytes")
        await self._llm.sleep(level=2, mode="wait")
        return sum(await self._llm.collective_rpc("free_bytes")) - sum(before)

    async def wake(self, part: Literal["weights", "kv_cache"]) -> None:
        """Take memory again, without what was in it."""
        if self._options.on_gpu:
            await self._llm.wake_up(tags=[part])
        elif part == "kv_cache":
            await self._llm.collective_rpc("remake_cache")
            await self._llm.resume_generation()

    async def places(self) -> list[tuple[str, str]]:
        """Return where each worker's parameters are: memory and device, as in conversion's `Place`."""
        return await self._llm.collective_rpc("place")

    async def open_audit(self, config: dict[str, Any], dtype: str) -> None:
        """Prepare to audit what the workers loaded by themselves; see conversion.vllm."""
        await self._llm.collective_rpc("open_audit", args=(config, dtype))

    async def audit(self, version: int) -> list[dict[str, Any]]:
        """Return what each worker holds, in digests, and the faults it found itself; see conversion.vllm."""
        return await self._llm.collective_rpc("audit", args=(version,))

    async def digest_rows(self, index: int) -> list[list[int]]:
        """Return each worker's digests of the rows of its part `index`."""
        return await self._llm.collective_rpc("digest_rows", args=(index,))

    async def close(self) -> None:
        """End vLLM's own processes before this actor ends."""
        if self._llm is not None:
            with contextlib.suppress(Exception):
                self._llm.shutdown()


def _tell_ends(processes: list[Any]) -> None:
    """Write how each of vLLM's core processes ended to the actor's output: vLLM itself says only that one is dead."""
    running = {process.sentinel: process for process in processes}
    while running:
        for sentinel in multiprocessing.connection.wait(list(running)):
            process = running.pop(sentinel)
            while process.exitcode is None:  # another thread waits for it too, and one of the two hears it
                time.sleep(0.01)
            print(f"{process.name} {ended(process.exitcode)}", file=sys.stderr, flush=True)


CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # of vLLM's CPUAttentionBackend

_GRAPHS = {
    "none": "run the model as it is: no graphs, nothing compiled",
    "decode": "replay a captured graph for each decode step; nothing is compiled",
    "compiled": "compile the model, which takes a minute or two at the start, and replay graphs where there is a GPU",
}


def graphs_of(rollout: RolloutConfig, *, on_gpu: bool) -> tuple[Graphs, str]:
    """Return what an engine does beside running the model as it is, and that in words, with who chose it."""
    if rollout.graphs is not None:
        return rollout.graphs, f"{_GRAPHS[rollout.graphs]} (rollout.graphs={rollout.graphs})"
    graphs: Graphs = "decode" if on_gpu else "none"
    return graphs, f"{_GRAPHS[graphs]} (rollout.graphs: {graphs} by default, {'on a GPU' if on_gpu else 'on a CPU'})"


def check_graphs(rollout: RolloutConfig, *, on_gpu: bool) -> None:
    """Raise ValueError for graphs that engines on such a device can't have."""
    if rollout.graphs == "decode" and not on_gpu:
        raise ValueError(
            "rollout.graphs=decode: graphs are captured on a GPU, and none is here; leave the key out, or set none"
        )


def check_head_size(head_dim: int, *, on_gpu: bool) -> None:
    """Raise ValueError for heads that vLLM has no attention for on a CPU: its engines start, and fail at a request."""
    if not on_gpu and head_dim not in CPU_HEAD_SIZES:
        raise ValueError(
            f"its attention heads have {head_dim} numbers each, and vLLM has heads on a CPU of "
            f"{', '.join(map(str, CPU_HEAD_SIZES))} alone; take another model, or a machine with a GPU"
        )


def _was_cut(finish_reason: str | None) -> bool:
    """Whether a response was cut by the token limit, not ended by a stop token. RuntimeError where it was neither."""
    if finish_reason not in ("stop", "length"):
        raise RuntimeError(
            f"vLLM ended a response with finish_reason={finish_reason!r}, expected 'stop' or 'length': the model has "
            "not ended it, so its reward would be of another text. The engine's log says why; start the command again, "
            "which draws it anew"
        )
    return finish_reason == "length"


def engine_arguments(options: EngineOptions) -> dict[str, Any]:
    """The engine's one device function: vLLM's arguments on CPU and on GPU."""
    rollout = options.rollout
    arguments: dict[str, Any] = {
        "model": options.model_path,
        # Not "auto": a consolidated*.safetensors or a params.json of Mistral's would be taken instead of ours.
        "load_format": "safetensors",
        "config_format": "hf",
        "trust_remote_code": False,  # no code from the model's folder runs
        "dtype": options.dtype,
        "seed": options.seed,
        "max_model_len": options.max_tokens,
        "max_num_seqs": rollout.max_num_seqs,
        "tensor_parallel_size": rollout.tensor,
        # Left out, vLLM sees that it is in a placement group of Ray's and makes its workers Ray actors.
        **({"distributed_executor_backend": "mp"} if rollout.tensor > 1 else {}),
        **_graph_arguments(graphs_of(rollout, on_gpu=options.on_gpu)[0]),
        "enable_prefix_caching": True,
        "skip_tokenizer_init": True,
        "logprobs_mode": "processed_logprobs",
        "disable_log_stats": True,
        "generation_config": "vllm",  # the folder's own sampling defaults would change the behaviour policy
        "worker_extension_cls": "conversion.vllm.WorkerExtension",
        "weight_transfer_config": {"backend": "astar_tiles"},
    }
    if options.on_gpu:
        return arguments | {
            "enable_sleep_mode": options.sleep,
            "gpu_memory_utilization": rollout.gpu_memory_utilization,
            # The other kernels for experts lay their weights out anew at load, where a publish could not write to them.
            "moe_backend": "triton",
            # Logits in float32, as the policy's head has them; the product of bfloat16 factors sums in it anyway. Not
            # on a CPU, where vLLM casts the whole weight at each step: SmolLM2's gap to the policy fell from 0.25 to
            # 0.19 nat (root mean square, 24 tokens), and generation took 1.2 to 1.4 times the CPU seconds.
            "hf_overrides": {"head_dtype": "float32"},
        }
    return arguments | {
        # A seeded request that chunked prefill splits raises on CPU, so the longest prompt must fit one pass.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(4096, options.max_tokens),
        # The smallest block the CPU kernels take: samples of a short prompt still share its full blocks.
        "block_size": 32,
    }


def _graph_arguments(graphs: Graphs) -> dict[str, Any]:
    if graphs != "decode":
        return {"enforce_eager": graphs == "none"}  # else vLLM compiles, and captures both decode and mixed steps
    return {"enforce_eager": False, "compilation_config": {"mode": "NONE", "cudagraph_mode": "FULL_DECODE_ONLY"}}


def leave_out_unreadable() -> list[str]:
    """Remove the environment variables that vLLM could not read, and return them in words. Before vLLM is imported.

    Kubernetes sets VLLM_PORT=tcp://... beside any service named vllm, and vLLM reads all its variables at start: one of
    the wrong type ends the engine.
    """
    package = importlib.util.find_spec("vllm")
    assert package is not None and package.origin is not None
    variables = runpy.run_path(str(Path(package.origin).with_name("envs.py")))  # alone: the package reads some itself
    left_out = []
    for name, read in variables["environment_variables"].items():
        if (value := os.environ.pop(name, None)) is None:
            continue
        os.environ[name] = value
        try:
            read()
        except ValueError as error:
            os.environ.pop(name)
            left_out.append(f"{name}={value!r:.100}, which vLLM can't read: {error!s:.200}")
    return left_out


def environment(
    rollout: RolloutConfig, *, gpus: Sequence[str], threads: int, dtype: str, socket_folder: str | None
) -> dict[str, str]:
    """Return the environment variables that vLLM reads before it is imported, of an engine that computes in `dtype`.

    Its workers see the `gpus` of these names. Its unix sockets go to `socket_folder` (none: TMPDIR), whose name must be
    short.
    """
    common = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"}
    # An engine's processes are all on one node, and meet on loopback: there no address changes, and nobody else comes.
    common |= {"VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    # Of other uses of vLLM: the model is a folder here, and an engine is no part of a group of them.
    common |= {"VLLM_USE_MODELSCOPE": "0", "VLLM_DP_SIZE": "1", "VLLM_DP_RANK": "0"}
    if socket_folder:
        common |= {"VLLM_RPC_BASE_PATH": socket_folder}
    if gpus or rollout.tensor == 1:  # without GPUs vLLM binds the threads of several workers itself
        common |= {"OMP_PROC_BIND": "false"}
    if gpus:
        common |= {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
        # vLLM's attention in float32 is in Triton, which multiplies it as TF32 unless it is told otherwise.
        return common | ({"TRITON_F32_DEFAULT": "ieee"} if dtype == "float32" else {})
    if rollout.graphs != "compiled":
        # Else the first draw with log-probs waits five seconds for a compiler, for tokens' ranks, which nobody reads.
        common |= {"TORCH_COMPILE_DISABLE": "1"}
    if rollout.tensor == 1:
        # One process for engine core and worker: two would wait for each other by spinning, on the worker's cores.
        common |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    bind = "nobind" if rollout.tensor == 1 else "|".join(str(worker) for worker in range(rollout.tensor))
    return common | {
        "VLLM_CPU_KVCACHE_SPACE": str(rollout.kv_cache_gib),
        "VLLM_CPU_OMP_THREADS_BIND": bind,
        "OMP_NUM_THREADS": str(threads),
        # Threads that spin while the other side computes slow both three-fold.
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "0",
    }
