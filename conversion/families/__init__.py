"""The architectures this library knows, one declarative table each, and the way from a config.json to a `Model`."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conversion.families import fields
from conversion.families.config import Family, RopeScaling
from conversion.families.fields import UnsupportedModelError
from conversion.families.llama import LLAMA
from conversion.families.mistral import MISTRAL
from conversion.families.model import Model, contrast, model_of
from conversion.families.qwen2 import QWEN2
from conversion.families.qwen3 import QWEN3
from conversion.families.qwen3_moe import QWEN3_MOE

__all__ = [
    "FAMILIES",
    "Model",
    "RopeScaling",
    "UnsupportedModelError",
    "contrast",
    "how_to_download",
    "model_from_config",
    "read_model",
]

FAMILIES: tuple[Family, ...] = (LLAMA, MISTRAL, QWEN2, QWEN3, QWEN3_MOE)

_GEMMA = (
    "megatron-core 0.19's local layers cannot hold it: they have no norm after attention and feed-forward, their norms "
    "multiply by the weight instead of 1 + weight, "
)
# Architectures that were looked at and cannot be had, with the reason.
REFUSED = {
    "Gemma2ForCausalLM": _GEMMA + "and they neither cap attention scores and logits nor give every other layer a "
    "sliding window",
    "Gemma3ForCausalLM": _GEMMA + "and they do not alternate sliding-window layers with full ones of another rope base",
}
REFUSED["Gemma3ForConditionalGeneration"] = REFUSED["Gemma3ForCausalLM"]


def read_model(path: str | Path) -> Model:
    """The model of an HF folder, from its config.json. UnsupportedModelError if it says something not modelled.

    Both this and the ValueError of a file that is none name the file.
    """
    file = Path(path) / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{path} is no model folder in Hugging Face's format: it has no config.json; name one that has"
            f"{how_to_download(path)}"
        ) from None
    except OSError as error:
        raise ValueError(f"{file}: can't be read: {error.strerror}; name a model folder of this machine") from error
    except (ValueError, RecursionError) as error:  # also bytes that are no UTF-8, numbers of thousands of digits
        raise ValueError(f"{file} is no JSON: {error}; copy the file again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(config).__name__}; copy the file again")
    try:
        return model_from_config(config)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{file}: {error}") from error


def how_to_download(path: str | Path) -> str:
    """Return words for a path that may be a model's name on the hub: how it becomes a folder. Nothing for another."""
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(path)) or Path(path).exists():
        return ""
    folder = f"runs/models/{Path(path).name}"
    return f". If it is a name of the hub: .venv/bin/hf download {path} --local-dir {folder}, then name {folder}"


def model_from_config(config: Mapping[str, Any]) -> Model:
    """The model an HF configuration describes, as the plain mapping that config.json holds."""
    architectures = fields.names(config, "architectures") or [
        family.architecture for family in FAMILIES if family.model_type == config.get("model_type")
    ]
    for family in FAMILIES:
        if architectures != [family.architecture]:
            continue
        if config.get("model_type") is None:
            raise UnsupportedModelError(
                f"{family.architecture}: model_type is missing, without which transformers does not open the folder: "
                f'add "model_type": "{family.model_type}"'
            )
        if config["model_type"] == family.model_type:
            return model_of(family, config)
    for name in architectures:
        if name in REFUSED:
            raise UnsupportedModelError(f"{name} is not supported: {REFUSED[name]}")
    known = ", ".join(family.architecture for family in FAMILIES)
    raise UnsupportedModelError(
        f"architectures={config.get('architectures')!r} with model_type={config.get('model_type')!r} is not known; "
        f"known are {known}"
    )
