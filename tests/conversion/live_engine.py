"""A program: publishes weights into a live vLLM engine and asks a fresh engine on an export of them the same.

    python live_engine.py TENSOR REQUESTS.json ANSWERS.json

A request names the folder the live engine starts from, the export, and what init_weight_transfer_engine gets; the
sender is another process. An answer holds what both engines say: greedy tokens, and log-probabilities of prompts; what
the live engine's workers hold by their own word, as they are and with faults injected; and what is not the export's.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TORCH_COMPILE_DISABLE": "1",
}
if sys.argv[1] == "1":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


from live_faults import live_faults
from vllm import LLM, SamplingParams


def engine(folder: str, tensor: int) -> LLM:
    return LLM(
        folder,
        dtype="float32",
        tensor_parallel_size=tensor,
        skip_tokenizer_init=True,
        max_model_len=64,
        max_num_seqs=8,
        max_num_batched_tokens=256,
        enable_chunked_prefill=False,
        enforce_eager=True,
        weight_transfer_config={"backend": "astar_tiles"},
        worker_extension_cls="worker_faults.FaultyWorker",
    )


def generated(llm: LLM, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """Greedy tokens, and the log-probabilities of all prompt tokens but the first and of all new ones."""
    sampling = SamplingParams(temperature=0.0, max_tokens=12, logprobs=0, prompt_logprobs=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    answers = []
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = list(output.outputs[0].token_ids)
        entries: list[Any] = [*(output.prompt_logprobs or [])[1:], *(output.outputs[0].logprobs or [])]
        logprobs = [entry[token].logprob for token, entry in zip([*prompt[1:], *tokens], entries, strict=True)]
        answers.append({"tokens": tokens, "logprobs": logprobs})
    return answers


def answered(request: dict[str, Any], tensor: int) -> dict[str, Any]:
    live = engine(request["folder"], tensor)
    live.collective_rpc("init_weight_transfer_engine", args=(request["init_info"],))
    answer: dict[str, Any] = {"before": generated(live, request["prompts"]), "places": live.collective_rpc("place")}
    live.collective_rpc("remember_packs")
    live.collective_rpc("start_weight_update")
    live.collective_rpc("update_weights", args=({"version": 7},))
    live.collective_rpc("finish_weight_update")
    live.reset_prefix_cache()
    answer["audits"] = {"none": live.collective_rpc("audit", args=(7,))}
    answer["rows_of"] = {}
    for name, fault in live_faults(request["init_info"]["config"], tensor).items():
        live.collective_rpc("inject", kwargs=dataclasses.asdict(fault))
        answer["audits"][name] = live.collective_rpc("audit", args=(7,))
        answer["rows_of"][name] = live.collective_rpc("rows_of", args=(fault.named,))
        live.collective_rpc("mend")
    answer["rows"] = live.collective_rpc("digest_rows", args=(0,))
    answer |= {"after": generated(live, request["prompts"]), "versions": live.collective_rpc("weights_version")}
    live.reset_prefix_cache()
    answer["dropped"] = live.collective_rpc("drop_cache")
    live.collective_rpc("remake_cache")
    answer["again"] = generated(live, request["prompts"])
    if "num_experts" in request["init_info"]["config"]:
        answer["laid_out_anew"] = live.collective_rpc("refusal_of_a_kernel_that_lays_experts_out_anew")
    answer["live differences"] = live.collective_rpc("differences", args=(request["export"], tensor))
    wrong = request["init_info"] | {"config": request["init_info"]["config"] | {"intermediate_size": 64}}
    try:
        live.collective_rpc("init_weight_transfer_engine", args=(wrong,))
    except Exception as error:
        answer["refusal"] = str(error)
    live.llm_engine.engine_core.shutdown()
    fresh = engine(request["export"], tensor)
    answer["fresh"] = generated(fresh, request["prompts"])
    answer["fresh differences"] = fresh.collective_rpc("differences", args=(request["export"], tensor))
    fresh.llm_engine.engine_core.shutdown()
    return answer


if __name__ == "__main__":
    requests = json.loads(Path(sys.argv[2]).read_text())
    Path(sys.argv[3]).write_text(json.dumps([answered(request, int(sys.argv[1])) for request in requests]))
