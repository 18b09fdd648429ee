"""What is made to go wrong in a live worker, and what its audit must name then. Imports no vLLM."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveFault:
    """`named` is the HF tensor whose digest must be wrong from row `row` of the part on; of a pack, vLLM's own name.

    `worker` is the only one that is spoiled; None: all are.
    """

    kind: Literal["pack", "expert pack", "moved", "bit", "swap", "key head"]
    module: str
    named: str
    row: int = 0
    worker: int | None = None

    @property
    def words(self) -> str | None:
        """What is said where the weights are right, but not what vLLM computes with; None: the weights are wrong."""
        return {"pack": "packed copy", "expert pack": "packed copy", "moved": "when graphs were captured"}.get(
            self.kind
        )


def live_faults(config: Mapping[str, object], tensor: int) -> dict[str, LiveFault]:
    """The faults of a model in an engine of `tensor` workers."""
    attention, mlp = "model.layers.0.self_attn", "model.layers.1.mlp"
    faults = {
        "stale head": LiveFault(kind="pack", module="lm_head", named="lm_head.weight"),
        "flipped bit": LiveFault(kind="bit", module=f"{attention}.o_proj", named=f"{attention}.o_proj.weight", row=5),
        "moved": LiveFault(kind="moved", module=f"{attention}.o_proj", named=f"{attention}.o_proj.weight"),
        "wrong key-value replica": LiveFault(
            kind="key head", module=f"{attention}.qkv_proj", named=f"{attention}.k_proj.weight", worker=tensor - 1
        ),
    }
    if "num_experts" in config:
        width = int(str(config["moe_intermediate_size"]))  # gate and up of the first two experts come before
        experts = f"{mlp}.experts.routed_experts"
        return faults | {
            "stale pack": LiveFault(
                kind="expert pack", module=experts, named=f"{experts}.w13_weight", row=2 * 2 * width // tensor
            ),
            "swapped gate and up": LiveFault(kind="swap", module=experts, named=f"{mlp}.experts.0.gate_proj.weight"),
        }
    return faults | {
        "stale pack": LiveFault(kind="pack", module=f"{mlp}.down_proj", named=f"{mlp}.down_proj.weight"),
        "swapped gate and up": LiveFault(kind="swap", module=f"{mlp}.gate_up_proj", named=f"{mlp}.gate_proj.weight"),
    }
