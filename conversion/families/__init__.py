"""The architectures this library knows, one declarative table each, and the way from a config.json to a `Model`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conversion.families.config import Family, UnsupportedModelError
from conversion.families.llama import LLAMA
from conversion.families.model import Model, model_of
from conversion.families.qwen2 import QWEN2

__all__ = ["FAMILIES", "Model", "UnsupportedModelError", "model_from_config", "read_model"]

FAMILIES: tuple[Family, ...] = (LLAMA, QWEN2)


def read_model(path: str | Path) -> Model:
    """The model of an HF folder, from its config.json. UnsupportedModelError if it says something not modelled."""
    file = Path(path) / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{path} is no model folder in Hugging Face's format: it has no config.json; name one that has"
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(config).__name__}")
    return model_from_config(config)


def model_from_config(config: Mapping[str, Any]) -> Model:
    """The model an HF configuration describes, as the plain mapping that config.json holds."""
    architectures = config.get("architectures") or [
        family.architecture for family in FAMILIES if family.model_type == config.get("model_type")
    ]
    for family in FAMILIES:
        if architectures == [family.architecture] and config.get("model_type", family.model_type) == family.model_type:
            return model_of(family, config)
    known = ", ".join(family.architecture for family in FAMILIES)
    raise UnsupportedModelError(
        f"architectures={config.get('architectures')!r} with model_type={config.get('model_type')!r} is not known; "
        f"known are {known}"
    )
