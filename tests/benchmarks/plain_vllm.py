"""A process of plain vLLM, for sweep.py and demo.py, and the program that it runs: JSON, a line a command, on stdin.

The first line names model, type and limits, the second the prompts with their seeds. Each other draws and is answered:
a number (so many samples a prompt, one seed, no log-probs), or "same" (each response a request of its own, with its
seed and its log-prob).
"""

import json
import os
import subprocess
import sys
import time
from typing import Any

from astar_megatron.config import RunConfig
from astar_megatron.rollout.requests import seed_of
from astar_megatron.types import Prompt

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}


class Plain:
    """The process, which loads at once and draws when told."""

    def __init__(self, cfg: RunConfig, prompts: list[Prompt], dtype: str, samples: int) -> None:
        env = os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": str(os.cpu_count())}
        command = [sys.executable, __file__]
        self._process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        work = [(p.token_ids, [seed_of(cfg.seed, "sweep", p.uid, n) for n in range(samples)]) for p in prompts]
        self._tell({"model": cfg.model.path, "dtype": dtype, "limits": [cfg.max_tokens, cfg.rollout.max_num_seqs]})
        self._tell({"work": work, "max_tokens": cfg.sampling.max_response_tokens})

    def _tell(self, command: Any) -> None:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()

    def draw(self, command: int | str) -> dict[str, float]:
        """Return the seconds it took, and how many tokens it drew."""
        self._tell(command)
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith("plain "):
                return json.loads(line.removeprefix("plain "))
        raise RuntimeError("plain vLLM ended")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def main() -> None:
    from vllm import LLM, SamplingParams

    first = json.loads(sys.stdin.readline())
    max_tokens, max_num_seqs = first["limits"]
    llm = LLM(
        first["model"],
        dtype=first["dtype"],
        enforce_eager=True,
        max_model_len=max_tokens,
        max_num_seqs=max_num_seqs,
        enable_chunked_prefill=False,
        max_num_batched_tokens=max(4096, max_tokens),
        block_size=32,
        generation_config="vllm",
        logprobs_mode="processed_logprobs",
    )
    second = json.loads(sys.stdin.readline())
    usual: dict[str, Any] = {"temperature": 1.0, "max_tokens": second["max_tokens"]}
    prompts: list[Any] = [{"prompt_token_ids": ids} for ids, _ in second["work"]]
    each = [(ids, seed) for ids, seeds in second["work"] for seed in seeds]
    same = [SamplingParams(**usual, seed=seed, logprobs=0) for _, seed in each]
    for line in sys.stdin:
        llm.reset_prefix_cache()
        command, start = json.loads(line), time.perf_counter()
        if command == "same":
            outputs = llm.generate([{"prompt_token_ids": ids} for ids, _ in each], same, use_tqdm=False)
        else:
            outputs = llm.generate(prompts, SamplingParams(**usual, n=command, seed=0), use_tqdm=False)
        tokens = sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
        print("plain " + json.dumps({"seconds": time.perf_counter() - start, "tokens": tokens}), flush=True)


if __name__ == "__main__":
    main()
