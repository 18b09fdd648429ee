"""The worker's extension with faults to inject, for the tests of the verification in a live engine."""

from typing import Any

import torch
from torch import nn

from conversion.vllm import WorkerExtension, repack

FAULTS = {  # what goes wrong, and in which module
    "stale head pack": "lm_head",
    "stale pack": "model.layers.1.mlp.down_proj",
    "flipped bit": "model.layers.0.self_attn.o_proj",
    "swapped gate and up": "model.layers.1.mlp.gate_up_proj",
}


class FaultyWorker(WorkerExtension):
    """A worker in which one thing goes wrong on request; `mend` puts it right again."""

    model_runner: Any

    def _module(self, name: str) -> Any:
        return self.model_runner.get_model().get_submodule(name)

    def remember_packs(self) -> None:
        """Keep the packs that there are now, to bring them back as stale ones."""
        model: nn.Module = self.model_runner.get_model()
        self._packs = {name: m.cpu_linear for name, m in model.named_modules() if hasattr(m, "cpu_linear")}

    def inject(self, fault: str) -> None:
        name = FAULTS[fault]
        module = self._module(name)
        self._kept = (module.weight, module.weight.detach().clone())
        if fault.startswith("stale"):
            module.cpu_linear = self._packs[name]
            return
        with torch.no_grad():
            if fault == "flipped bit":
                module.weight.view(torch.int32)[5, 3] ^= 1
            else:
                module.weight.copy_(torch.cat(module.weight.chunk(2)[::-1]))
        repack(self.model_runner.get_model())  # so that the pack agrees with the wrong weight

    def mend(self) -> None:
        weight, right = self._kept
        with torch.no_grad():
            weight.copy_(right)
        repack(self.model_runner.get_model())
