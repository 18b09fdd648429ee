"""Generation by bare vLLM and by the pool, on the same requests: tokens a second and milliseconds a decode step.

    PYTHONPATH=$PWD python3 tests/benchmarks/gpu_generation.py [--graphs decode none compiled] [--json FILE]

256 requests of 1,024 tokens at Qwen2.5-1.5B's shape with random weights, on one GPU. Bare vLLM draws them plainly, with
a seed each, and with a seed and log-probs each, under model runner V1 and V2, a process each; the pool draws them as
training does, with its head in float32. Each draws two sets of prompts, and the second counts. A row is printed, and
written to FILE, when it is there; what failed is named in the end, with status 1. Each of `--graphs` may take ten
minutes. `--shape tiny` runs on a CPU, to see that this program does; V2 and decode graphs need a GPU.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("plain", "seeds", "seeds and log-probs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What is drawn, and by what kind of engine; plain values, which cross a pipe as JSON."""

    model: str
    vocab_size: int
    requests: int
    prompt_tokens: int
    tokens: int
    on_gpu: bool
    graphs: str

    @property
    def max_tokens(self) -> int:
        return self.prompt_tokens + self.tokens

    def prompts(self, turn: int) -> list[list[int]]:
        """Return prompts that share nothing, with each other or those of another turn."""
        import torch

        generator = torch.Generator().manual_seed(turn)
        return torch.randint(
            10, self.vocab_size - 10, (self.requests, self.prompt_tokens), generator=generator
        ).tolist()


def engine_options(work: Work) -> Any:
    from astar_megatron.config import RolloutConfig
    from astar_megatron.rollout.engine import EngineOptions

    rollout = RolloutConfig(graphs=work.graphs, max_num_seqs=work.requests, gpu_memory_utilization=0.85)  # type: ignore[arg-type]
    return EngineOptions(
        model_path=work.model,
        dtype="bfloat16",
        max_tokens=work.max_tokens,
        stop_token_ids=(),
        seed=0,
        rollout=rollout,
        on_gpu=work.on_gpu,
    )


def bare(work: Work) -> None:
    """Print the figures of each kind, a line of JSON each; a process of its own, whose environment is made for it."""
    from vllm import LLM, SamplingParams

    from astar_megatron.rollout.engine import engine_arguments

    options = engine_options(work)
    ours = ("worker_extension_cls", "weight_transfer_config", "hf_overrides", "moe_backend")  # bare: without them
    llm = LLM(**{name: value for name, value in engine_arguments(options).items() if name not in ours})
    for number, kind in enumerate(KINDS):
        more: dict[str, Any] = {"logprobs": 0} if "log-probs" in kind else {}
        sampling = [
            SamplingParams(
                max_tokens=work.tokens,
                ignore_eos=True,
                detokenize=False,
                seed=index if "seeds" in kind else None,
                **more,
            )
            for index in range(work.requests)
        ]
        for turn in range(2):
            prompts: Any = [{"prompt_token_ids": ids} for ids in work.prompts(2 * number + turn)]
            start = time.perf_counter()
            outputs = llm.generate(prompts, sampling, use_tqdm=False)
            if turn:
                lengths = [len(output.outputs[0].token_ids) for output in outputs]
                print("bare " + json.dumps(figures(kind, time.perf_counter() - start, lengths)), flush=True)


def figures(kind: str, seconds: float, lengths: list[int]) -> dict[str, Any]:
    """Return a row of the table; a decode step gives each sequence a token, so the longest counts them."""
    return {
        "kind": kind,
        "seconds": round(seconds, 2),
        "tokens/s": round(sum(lengths) / seconds),
        "ms a decode step": round(1000 * seconds / max(lengths), 2),
    }


def bare_rows(work: Work, runner: int) -> Iterator[dict[str, Any]]:
    from astar_megatron.config import RolloutConfig
    from astar_megatron.rollout.engine import environment

    rollout = RolloutConfig(graphs=work.graphs, kv_cache_gib=1)  # type: ignore[arg-type]
    threads = os.cpu_count() or 1
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[:1] if work.on_gpu else []
    env = environment(rollout, gpus=gpus, threads=threads, dtype="bfloat16", socket_folder=None)
    env |= {"VLLM_USE_V2_MODEL_RUNNER": str(runner - 1)}
    command = [sys.executable, __file__, "--bare", json.dumps({name: getattr(work, name) for name in Work.__slots__})]
    with subprocess.Popen(command, env=os.environ | env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("bare "):
                yield {"who": f"bare vLLM, runner V{runner}", "graphs": work.graphs} | json.loads(line[5:])
    if process.returncode:
        raise RuntimeError(f"its process ended with {process.returncode}; what it said is above")


def pool_rows(work: Work) -> Iterator[dict[str, Any]]:
    from astar_megatron.cluster.cluster import Cluster
    from astar_megatron.cluster.placement import place
    from astar_megatron.config import ClusterConfig, RewardConfig, SamplingConfig
    from astar_megatron.rollout.pool import EnginePool
    from astar_megatron.rollout.source import RolloutSource
    from astar_megatron.types import Prompt, Request

    options = engine_options(work)
    sampling, reward = SamplingConfig(max_response_tokens=work.tokens), RewardConfig(name="last_number")
    with Cluster(ClusterConfig(start_timeout_seconds=900)) as cluster:
        cluster.reserve(place(cluster.nodes.values(), None, options.rollout, share_gpus=False))
        start = time.perf_counter()
        pool = EnginePool(cluster, options, detokenize=lambda token_ids: "")
        pool.start()
        ready = time.perf_counter()
        for turn in range(2):
            prompts = [
                Prompt(uid=str(i), token_ids=tuple(ids), text="", answer="0")
                for i, ids in enumerate(work.prompts(turn))
            ]
            requests = [Request(prompt=prompt, sample=0, seed=index) for index, prompt in enumerate(prompts)]
            with RolloutSource(pool, sampling, reward, Path(work.model).parent) as source:
                first = time.perf_counter()
                rollouts = source.ask(requests).rollouts()
                seconds = time.perf_counter() - first
        pool.close()
    row = figures(KINDS[-1], seconds, [len(rollout.token_ids) for rollout in rollouts])
    yield {"who": "the pool", "graphs": work.graphs} | row | {"start, s": round(ready - start, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1.5b")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--graphs", nargs="+", default=["decode", "none", "compiled"])
    parser.add_argument("--runners", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--bare", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare:
        bare(Work(**json.loads(arguments.bare)))
        return
    import torch
    from gpu_models import SHAPES, write_model

    device = device_name() if torch.cuda.is_available() else "a CPU"
    print(f"{arguments.requests} requests of {arguments.tokens} tokens, shape {arguments.shape}, {device}", flush=True)
    rows, failures = [], []
    with tempfile.TemporaryDirectory() as folder:
        model = str(write_model(Path(folder), arguments.shape))
        for graphs in arguments.graphs:
            work = Work(
                model=model,
                vocab_size=SHAPES[arguments.shape]["vocab_size"],
                requests=arguments.requests,
                prompt_tokens=min(128, arguments.tokens),
                tokens=arguments.tokens,
                on_gpu=torch.cuda.is_available(),
                graphs=graphs,
            )
            for who, measure in draws(arguments.runners):
                try:
                    for row in measure(work):
                        rows.append(row)
                        print("  ".join(f"{name} {figure}" for name, figure in row.items()), flush=True)
                        if arguments.json:
                            text = json.dumps({"device": device, "rows": rows}, indent=1)
                            arguments.json.write_text(text + "\n")
                except Exception as error:  # vLLM and Ray raise of all kinds, and the others are still to be seen
                    failures.append(f"{who}, graphs {graphs}: {type(error).__name__}: {error}")
    if failures:
        sys.exit("\n".join(failures))


def device_name() -> str:
    """Return the GPU's name, asked in a process of its own: whoever asks takes memory there."""
    command = [sys.executable, "-c", "import torch; print(torch.cuda.get_device_name(0))"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def draws(runners: list[int]) -> Iterator[tuple[str, Callable[[Work], Iterator[dict[str, Any]]]]]:
    """Yield who draws, and what yields their rows."""
    for runner in runners:
        yield f"bare vLLM, runner V{runner}", partial(bare_rows, runner=runner)
    yield "the pool", pool_rows


if __name__ == "__main__":
    main()
