"""Model folders with random weights, made on the spot: the shapes that benchmarks are stated for."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from conversion.families import model_from_config

_COMMON: dict[str, Any] = {
    "hidden_act": "silu",
    "vocab_size": 151936,
    "num_hidden_layers": 28,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "eos_token_id": 151645,
    "bos_token_id": 151643,
    "dtype": "bfloat16",
}
_QWEN2: dict[str, Any] = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
SHAPES: dict[str, dict[str, Any]] = {
    "1.5b": _COMMON  # Qwen2.5-1.5B
    | _QWEN2
    | {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2},
    "3b": _COMMON  # Qwen2.5-3B
    | _QWEN2
    | {"hidden_size": 2048, "intermediate_size": 11008, "num_attention_heads": 16, "num_key_value_heads": 2}
    | {"num_hidden_layers": 36},
    "7b": _COMMON  # Qwen2.5-7B
    | _QWEN2
    | {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4}
    | {"vocab_size": 152064, "tie_word_embeddings": False},
    "0.6b": _COMMON  # Qwen3-0.6B
    | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 128, "attention_bias": False}
    | {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8},
    "smollm2": _COMMON  # SmolLM2-135M
    | {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 30, "vocab_size": 49152}
    | {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    | {"max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 1e5, "eos_token_id": 2, "bos_token_id": 1},
    "tiny": _COMMON  # for a CPU: that the program runs, no figure of anything
    | _QWEN2
    | {"hidden_size": 128, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    | {"vocab_size": 512, "num_hidden_layers": 2, "eos_token_id": 511, "bos_token_id": 510},
}


def write_model(folder: Path, shape: str) -> Path:
    """Write the model of a shape to `folder`, without a tokenizer, and return it."""
    config = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.ones(size, dtype=torch.bfloat16)
        if len(size) == 1 and "norm" in name
        else torch.empty(size, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)
        for name, size in model_from_config(config).parameters().items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
