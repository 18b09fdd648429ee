"""A program: starts vLLM engines and says what their workers hold, and how probable they find some prompts.

    python engine_holds.py TENSOR REQUESTS.json ANSWERS.json

A request names a folder and prompts. An answer holds, of every worker, the parameters that are not what the tiles of
the folder's model say they are, and the log-probabilities of the prompts' tokens but the first.
"""

import json
import sys
from pathlib import Path
from typing import Any

import live_engine  # sets the environment, before vllm is imported
import torch
from safetensors.torch import load_file
from tiny_models import empty_world, reference_world
from vllm import LLM
from vllm.distributed import get_tensor_model_parallel_rank

from conversion.families import read_model
from conversion.plan import plan
from conversion.vllm import WorkerExtension, check_coverage


class Holder(WorkerExtension):
    """A worker that can compare its parameters with the tiles of its own checkpoint."""

    def differences(self, folder: str, tensor: int) -> list[str]:
        """The names of parameters that differ in any bit. ValueError as check_coverage."""
        model, rank = read_model(folder), get_tensor_model_parallel_rank()
        module = self.model_runner.model  # type: ignore[attr-defined]
        check_coverage(model, plan(model.hf_tiles(), model.vllm_tiles(tensor)), tensor, rank, module)
        shapes = {worker: model.vllm_shapes(tensor, worker) for worker in range(tensor)}
        weights = load_file(Path(folder) / "model.safetensors")
        expected = reference_world(model.vllm_tiles(tensor), weights, empty_world(shapes))[rank]
        parameters = dict(module.named_parameters(remove_duplicate=False))
        padding = {name: tile.isnan() for name, tile in expected.items()}
        return [
            name
            for name, tile in expected.items()
            if not torch.equal(parameters[name].data[~padding[name]], tile[~padding[name]])
        ]


def answered(request: dict[str, Any], tensor: int) -> dict[str, Any]:
    engine: LLM = live_engine.engine(request["folder"], tensor, "engine_holds.Holder")
    answer = {
        "differences": engine.collective_rpc("differences", args=(request["folder"], tensor)),
        "generated": live_engine.generated(engine, request["prompts"]),
    }
    engine.llm_engine.engine_core.shutdown()
    return answer


if __name__ == "__main__":
    requests = json.loads(Path(sys.argv[2]).read_text())
    Path(sys.argv[3]).write_text(json.dumps([answered(request, int(sys.argv[1])) for request in requests]))
