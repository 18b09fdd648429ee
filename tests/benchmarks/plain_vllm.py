"""One plain vLLM process, for sweep.py: a line of JSON a command on stdin, an answer on stdout.

The first names model, type and limits, the second the prompts with their seeds. Each other draws and is answered: "n"
(n samples a prompt, one seed, no log-probs), "same" (each response a request of its own, with seed and log-prob) or
"warm-up".
"""

import json
import os
import sys
import time
from typing import Any

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}

from vllm import LLM, SamplingParams


def answer(**found: float) -> None:
    print("plain " + json.dumps(found), flush=True)


def main() -> None:
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
    prompts = [{"prompt_token_ids": ids} for ids, _ in second["work"]]
    samples = len(second["work"][0][1])
    plain = SamplingParams(n=samples, temperature=1.0, max_tokens=second["max_tokens"], seed=0)
    each = [
        (
            {"prompt_token_ids": ids},
            SamplingParams(temperature=1.0, max_tokens=second["max_tokens"], seed=s, logprobs=0),
        )
        for ids, seeds in second["work"]
        for s in seeds
    ]
    for line in sys.stdin:
        start = time.perf_counter()
        kind = json.loads(line)
        if kind == "warm-up":
            some: Any = [one for one, _ in each[: 8 * samples : samples]]
            outputs = llm.generate(some, each[0][1], use_tqdm=False)
        elif kind == "n":
            outputs = llm.generate(prompts, plain, use_tqdm=False)  # pyright: ignore[reportArgumentType]
        else:
            alone: Any = [one for one, _ in each]
            outputs = llm.generate(alone, [params for _, params in each], use_tqdm=False)
        seconds = time.perf_counter() - start
        answer(seconds=seconds, tokens=sum(len(one.token_ids) for output in outputs for one in output.outputs))


if __name__ == "__main__":
    main()
