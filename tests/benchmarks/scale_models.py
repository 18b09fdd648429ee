"""The models and layouts of slurm/SCALE.md, in the sizes that Qwen2.5's and Qwen3's configurations have."""

from dataclasses import dataclass
from typing import Any

from gpu_models import SHAPES

from conversion.families import Model, model_from_config
from conversion.tiles import ParallelLayout

_MOE: dict[str, Any] = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False}
_CONFIGS: dict[str, dict[str, Any]] = {
    "1.5B": SHAPES["1.5b"],
    "7B": SHAPES["1.5b"]
    | {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4}
    | {"vocab_size": 152064, "tie_word_embeddings": False},
    "32B": SHAPES["1.5b"]
    | {"hidden_size": 5120, "intermediate_size": 27648, "num_attention_heads": 40, "num_key_value_heads": 8}
    | {"vocab_size": 152064, "tie_word_embeddings": False, "num_hidden_layers": 64},
    "30B-A3B": SHAPES["0.6b"]
    | _MOE
    | {"hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 32, "num_key_value_heads": 4}
    | {"num_hidden_layers": 48, "tie_word_embeddings": False, "num_experts": 128, "num_experts_per_tok": 8}
    | {"moe_intermediate_size": 768, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How one copy of a model is spread: over ranks that train it, over the workers of an engine."""

    tensor: int
    pipeline: int
    expert: int
    workers: int

    def layout(self, ranks: int) -> ParallelLayout:
        """Return the layout of so many ranks, what is left of them being data-parallel."""
        data = ranks // (self.tensor * self.pipeline)
        return ParallelLayout(
            tensor=self.tensor, pipeline=self.pipeline, data=data, expert=min(self.expert, data), fused_norms=True
        )


SIZES = {
    "1.5B": Sizes(tensor=1, pipeline=1, expert=1, workers=1),
    "7B": Sizes(tensor=4, pipeline=2, expert=1, workers=2),
    "32B": Sizes(tensor=8, pipeline=4, expert=1, workers=4),
    "30B-A3B": Sizes(tensor=4, pipeline=1, expert=8, workers=4),
}


def model_named(name: str) -> Model:
    return model_from_config(_CONFIGS[name])
