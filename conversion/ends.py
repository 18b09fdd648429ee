"""The two kinds of folder that hold a model, Hugging Face's and Megatron's, and the way from any to any other.

Both answer in HF coordinates, a parameter at a time, so any folder can be written from any other, or compared with it,
in the memory of a few parameters.
"""

import re
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from conversion import checkpoint, hf
from conversion.checkpoint import CheckpointReader, Index
from conversion.families import Model, read_model
from conversion.plan import Copy, plan
from conversion.tiles import ParallelLayout

HELD = 4  # parameters an end keeps: what lies fused in one Megatron tensor is asked for together


class End(Protocol):
    """A folder that holds a whole model."""

    path: Path
    companions: Path  # the folder with its config.json and tokenizer
    model: Model
    kind: str
    dtype: torch.dtype

    def parameter(self, name: str) -> Tensor:
        """Return a parameter by its HF name, whole, on the host, as stored."""
        ...

    def vocabulary_note(self) -> str:
        """Return in words how the folder's vocabulary differs from the model's, if it does."""
        ...


class HuggingFaceEnd:
    """A safetensors folder with its config.json."""

    kind = "Hugging Face"

    def __init__(self, path: str | Path) -> None:
        self.path = self.companions = Path(path)
        self.model = read_model(path)
        self._holder = hf.check(self.path, self.model.parameters())
        self.dtype = hf.stored_dtype(self.path, self._holder)
        self.parameter = lru_cache(HELD)(self._parameter)

    def vocabulary_note(self) -> str:
        return ""

    def _parameter(self, name: str) -> Tensor:
        return hf.read(self.path / self._holder[name], name)


class MegatronEnd:
    """A distributed checkpoint, and the HF folder that says what model it is: its own, unless another is named."""

    kind = "Megatron"

    def __init__(self, path: str | Path, like: str | Path | None = None) -> None:
        self.path = Path(path)
        self._reader = CheckpointReader(self.path)
        if like is None and not (self.path / "config.json").is_file():
            raise ValueError(
                f"{self.path} has no config.json, so nothing says what model it holds; name a Hugging Face folder of "
                "the same model with --like"
            )
        self.companions = Path(like or self.path)
        self.model = read_model(self.companions)
        self._places = {name: global_place(name) for name in local_shapes(self.model)}
        self._copies: dict[str, list[Copy]] = {}
        for copy in plan(self.model.megatron_tiles(whole()), self.model.hf_tiles()).copies:
            self._copies.setdefault(copy.target.name, []).append(copy)
        self._check()
        self.dtype = self._reader.dtype(next(iter(self._places.values()))[0])
        self.parameter = lru_cache(HELD)(self._parameter)

    def _check(self) -> None:
        held = self._reader.shapes()
        for name, shape in local_shapes(self.model).items():
            stored, planes = self._places[name]
            if stored not in held:
                raise ValueError(f"{self.path} does not hold {stored}, which a {self.model.architecture} has")
            got = held[stored][len(planes) :]
            padded = len(shape) == 2 and got[0] >= shape[0] and is_vocabulary(name)
            if got[1:] != shape[1:] or (got[0] != shape[0] and not padded):
                raise ValueError(f"{self.path}: {stored} is {held[stored]}, expected {shape} for each layer")

    def vocabulary_note(self) -> str:
        padded = self._reader.shapes()["embedding.word_embeddings.weight"][0]
        return f", padded to {padded:,}" if padded != self.model.vocab_size else ""

    def _parameter(self, name: str) -> Tensor:
        out = torch.empty(self.model.parameters()[name], dtype=self.dtype)
        for copy in self._copies[name]:
            stored, planes = self._places[copy.source.name]
            index: Index = (*((plane, plane + 1) for plane in planes), *copy.source.index)
            out[copy.target.slices] = self._reader.read(stored, index).reshape(copy.source.shape)
        return out


def open_end(path: str | Path, like: str | Path | None = None) -> HuggingFaceEnd | MegatronEnd:
    """Return the end that lies at `path`. ValueError if neither kind does; `like` as in MegatronEnd."""
    if checkpoint.is_checkpoint(path):
        return MegatronEnd(path, like)
    if (Path(path) / "config.json").is_file():
        return HuggingFaceEnd(path)
    raise ValueError(
        f"{path} is neither a Hugging Face folder (config.json and safetensors) nor a distributed checkpoint of "
        f"Megatron ({checkpoint.MARK} and .metadata)"
    )


def whole() -> ParallelLayout:
    """The layout whose one rank holds what a distributed checkpoint holds."""
    return ParallelLayout(fused_norms=True)


def local_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Names and shapes of that one rank."""
    return model.megatron_shapes(whole(), 0)


def is_vocabulary(name: str) -> bool:
    """Whether a Megatron parameter has a row a token: only those are padded, each checkpoint to its own size."""
    return name in ("embedding.word_embeddings.weight", "output_layer.weight")


def global_place(name: str) -> tuple[str, tuple[int, ...]]:
    """Where a checkpoint keeps a parameter of that one rank: the stacked tensor, and its place in the stack.

    Megatron stacks the layers, and in them the experts: decoder.layers.3.mlp.experts.local_experts.5.linear_fc1.weight
    is [3, 5] of decoder.layers.mlp.experts.experts.linear_fc1.weight.
    """
    planes = tuple(int(number) for number in re.findall(r"\.(\d+)(?=\.)", name))
    stored = re.sub(r"\.\d+(?=\.)", "", name).replace(".local_experts.", ".experts.")
    return stored, planes
