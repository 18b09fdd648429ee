"""The worker's extension with faults to inject, for the tests of the verification in a live engine."""

from pathlib import Path
from typing import Any

import torch
from live_faults import LiveFault
from safetensors.torch import load_file
from tiny_models import reference_world, vllm_world
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend

from conversion.families import read_model
from conversion.plan import plan
from conversion.vllm import WorkerExtension, check_coverage, check_experts, repack


class FaultyWorker(WorkerExtension):
    """A worker in which one thing goes wrong on request; `mend` puts it right again."""

    model_runner: Any

    def weights_version(self) -> int | None:
        """The version of the last update that this worker received whole; None before the first."""
        return self.weight_transfer_engine.version  # type: ignore[attr-defined]

    def remember_packs(self) -> None:
        """Keep the packs that there are now, to bring them back as stale ones."""
        modules = list(self.model_runner.get_model().named_modules())
        self._packs: dict[str, Any] = {name: m.cpu_linear for name, m in modules if hasattr(m, "cpu_linear")}
        self._packs |= {name: m.astar_experts.packed for name, m in modules if hasattr(m, "astar_experts")}

    def inject(self, **fields: Any) -> None:
        fault = LiveFault(**fields)
        module = self.model_runner.get_model().get_submodule(fault.module)
        weight = module.w13_weight if hasattr(module, "w13_weight") else module.weight
        self._kept = (weight, weight.data, weight.detach().clone())
        if fault.worker not in (None, get_tensor_model_parallel_rank()):
            return
        if fault.kind == "pack":
            module.cpu_linear = self._packs[fault.module]
        elif fault.kind == "expert pack":
            new, old = (packs["w1"] for packs in (module.astar_experts.packed, self._packs[fault.module]))
            first = fault.row // weight.shape[1]  # the experts before it are packed as they should be
            module.astar_experts.packed = module.astar_experts.packed | {"w1": torch.cat([new[:first], old[first:]])}
        elif fault.kind == "moved":
            weight.data = weight.data.clone()
        else:
            with torch.no_grad():
                _spoil(fault.kind, module, weight)
            repack(self.model_runner.get_model())  # so that the pack agrees with the wrong weight

    def rows_of(self, tensor: str) -> list[tuple[int, list[int]]]:
        """The index and the digests of the rows of each part of an HF tensor that this worker holds."""
        parts = self.weight_transfer_engine._holdings.parts  # type: ignore[attr-defined]
        return [(index, self.digest_rows(index)) for index, part in enumerate(parts) if part.hf == tensor]

    def refusal_of_a_kernel_that_lays_experts_out_anew(self) -> str:
        """What this worker says if vLLM had chosen such a kernel for the experts of its first layer."""
        model = self.model_runner.get_model()
        method = next(layer.quant_method for layer in model.modules() if hasattr(layer, "w13_weight"))
        chosen = method.unquantized_backend
        method.unquantized_backend = UnquantizedMoeBackend.FLASHINFER_TRTLLM
        try:
            check_experts(model)
        except ValueError as error:
            return str(error)
        finally:
            method.unquantized_backend = chosen
        return "nothing"

    def differences(self, folder: str, tensor: int) -> list[str]:
        """The names of parameters that differ in any bit from what the tiles of the folder's model say they are.

        ValueError as check_coverage.
        """
        model, rank, module = read_model(folder), get_tensor_model_parallel_rank(), self.model_runner.get_model()
        check_coverage(model, plan(model.hf_tiles(), model.vllm_tiles(tensor)), tensor, rank, module)
        weights = load_file(Path(folder) / "model.safetensors")
        expected = reference_world(model.vllm_tiles(tensor), weights, vllm_world(model, tensor))[rank]
        parameters = dict(module.named_parameters(remove_duplicate=False))
        padding = {name: tile.isnan() for name, tile in expected.items()}
        return [
            name
            for name, tile in expected.items()
            if not torch.equal(parameters[name].data[~padding[name]], tile[~padding[name]])
        ]

    def mend(self) -> None:
        weight, weight.data, right = self._kept
        with torch.no_grad():
            weight.copy_(right)
        repack(self.model_runner.get_model())


def _spoil(kind: str, module: Any, weight: Tensor) -> None:
    if kind == "bit":
        weight.view(torch.int32)[5, 3] ^= 1
    elif kind == "swap":
        first = weight[0] if weight.dim() == 3 else weight  # of the first expert
        first.copy_(torch.cat(first.chunk(2)[::-1]))
    else:
        keys = weight[module.num_heads * module.head_size :][: module.num_kv_heads * module.head_size]
        keys.copy_(keys.roll(1, 0))
