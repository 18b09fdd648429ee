"""vLLM alone on the demo's stage 1 and on one step's rollouts, in-process: `vllm_floor.py DTYPE`; called by demo.py."""

import os
import sys
import time

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": str(os.cpu_count()),
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}

from vllm import LLM, SamplingParams

from astar_megatron.data.arithmetic import one_digit_additions

MODEL = "runs/models/smollm2-135m-instruct"


def main(dtype: str) -> None:
    llm = LLM(
        MODEL,
        dtype=dtype,  # pyright: ignore[reportArgumentType]
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=256,
        enable_chunked_prefill=False,
        max_num_batched_tokens=8192,
        block_size=32,
    )
    tokenizer = llm.get_tokenizer()
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["question"]}], tokenize=False, add_generation_prompt=True
        )
        for row in one_digit_additions()
    ]
    for name, samples in (("warm-up", 1), ("stage_1", 8), ("generate", 1)):
        llm.reset_prefix_cache()
        start = time.perf_counter()
        llm.generate(prompts, SamplingParams(n=samples, temperature=1.0, max_tokens=24, seed=samples), use_tqdm=False)
        print(f"floor {name} {time.perf_counter() - start:.1f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
