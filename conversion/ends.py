"""The two kinds of folder that hold a model, Hugging Face's and Megatron's, and the way from any to any other.

Both answer in HF coordinates, rows of a parameter at a time, so any folder can be written from any other, or compared
with it, in the memory of a few parts.
"""

import re
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from conversion import hf, torch_dist
from conversion.checkpoint_index import MARK
from conversion.families import Model, contrast, how_to_download, read_model
from conversion.folders import PROGRESS_FILE, RECORD, ModelFolderError, read_record
from conversion.plan import Copy, plan
from conversion.tiles import ParallelLayout, Tile
from conversion.torch_dist import CheckpointReader, Index
from conversion.weight_files import PICKLES

_HEAD = "output_layer.weight"
# Where a router follows, Transformer Engine's layers keep the norm apart, and Megatron's local ones under another name.
_NORM, _ALSO_NORM = "pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"
# What else a checkpoint holds is no part of the model: optimizer's states, and critic and reference under own prefixes.
_OF_THE_MODEL, _STATE = ("decoder.", "embedding.", "output_layer."), "._extra_state"
# Megatron-LM's make_vocab_size_divisible_by, unless it was set: times the tensor ranks, more padding has no vocabulary.
_VOCABULARY_MULTIPLE = 128


class End:
    """A folder that holds a whole model."""

    path: Path
    companions: Path  # the folder with its config.json and tokenizer
    model: Model
    kind: ClassVar[str]
    dtype: torch.dtype
    files: tuple[str, ...]  # that hold the weights

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return these rows of a parameter by its HF name, on the host, as stored; from any thread. Not to write to."""
        raise NotImplementedError

    def tiles(self) -> list[Tile]:
        """Return what lies in which of the files: their index is the tile's rank."""
        raise NotImplementedError

    def layout(self) -> dict[str, int] | None:
        """Return the axes of the ranks that it was written by or for; None if nothing says so. ModelFolderError."""
        return _layout(self.path, RECORD)

    def notes(self) -> dict[str, str]:
        """Return in words what else is known of the folder: its layout, padding of the vocabulary."""
        return {}


class HuggingFaceEnd(End):
    """A safetensors folder with its config.json."""

    kind = "Hugging Face"

    def __init__(self, path: str | Path) -> None:
        self.path = self.companions = Path(path)
        self.model = read_model(path)
        self._stored = hf.check(self.path, self.model.parameters())
        hf.check_one_type(self.path, self._stored)
        self.dtype = next(iter(self._stored.values())).dtype
        self.files = tuple(sorted({place.file for place in self._stored.values()}))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return hf.rows(self.path, self._stored[name], start, stop)

    def tiles(self) -> list[Tile]:
        ranks = {file: rank for rank, file in enumerate(self.files)}
        return [
            Tile(ranks[self._stored[tile.hf].file], tile.name, tile.hf, tile.rows, tile.cols)
            for tile in self.model.hf_tiles()
        ]


class ConfigEnd(End):
    """A config.json whose weights lie elsewhere: enough to plan with, and for nothing else."""

    kind = "Hugging Face, its weights are not here"
    files: tuple[str, ...] = ("the weights",)

    def __init__(self, path: str | Path) -> None:
        self.path = self.companions = Path(path)
        self.model = read_model(path)
        name = configured_dtype(self.model) or "float32"
        dtype = getattr(torch, name, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{self.path / 'config.json'}: dtype {name!r}, expected for example 'bfloat16'")
        self.dtype = dtype

    def tiles(self) -> list[Tile]:
        return self.model.hf_tiles()


class MegatronEnd(End):
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
        self._check_like()
        self._shapes, self._wanted = self._reader.shapes(), self.model.parameters()
        self._places = {name: self._place(name) for name in local_shapes(self.model)}
        self._copies: dict[str, list[Copy]] = {}
        for copy in plan(self.model.megatron_tiles(whole()), self.model.hf_tiles()).copies:
            self._copies.setdefault(copy.target.name, []).append(copy)
        self._check()
        stored = dict.fromkeys(stored for stored, _ in self._places.values())
        self._reader.check(stored)
        types = {self._reader.dtype(name): name for name in stored}
        if len(types) != 1:
            raise ValueError(f"{self.path} mixes types: {', '.join(f'{t} ({name})' for t, name in types.items())}")
        self.dtype = types.popitem()[0]
        self.files = tuple(sorted({file for name in stored for _, _, file in self._reader.chunks(name)}))

    def _check_like(self) -> None:
        """Refuses another folder's configuration where the checkpoint's own says that it computes otherwise."""
        own = self.path / "config.json"
        if not own.is_file() or self.companions == self.path:
            return
        if difference := contrast(read_model(self.path).computation(), self.model.computation()):
            raise ValueError(
                f"{own} and {self.companions / 'config.json'}, named with --like, compute differently: {difference}: "
                "leave out --like, or, if the first is wrong, remove it"
            )

    def _place(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Where it lies here: layers may be stacked or not, and a norm has two names."""
        places = [global_place(name), global_place(name, stack_layers=False)]
        for stored, planes in [*places, *((stored.replace(_NORM, _ALSO_NORM), planes) for stored, planes in places)]:
            if stored in self._shapes:
                return stored, planes
        return places[0]

    def _check(self) -> None:
        if self.model.tied and _HEAD in self._shapes:
            other = "" if self.companions == self.path else ", or name the right folder with --like"
            raise ValueError(
                f"{self.path} holds {_HEAD}, a head of its own, but {self.companions / 'config.json'} ties it to the "
                f"embedding: set tie_word_embeddings to false there{other}"
            )
        stacks: dict[str, tuple[int, ...]] = {}  # how many layers, and experts, the model has in each tensor
        for name, shape in local_shapes(self.model).items():
            stored, planes = self._places[name]
            if stored not in self._shapes:
                raise ValueError(f"{self.path} does not hold {stored}, which a {self.model.architecture} has")
            stored_shape = self._shapes[stored]
            plane_shape = stored_shape[len(planes) :]
            padded = len(shape) == 2 and len(plane_shape) == 2 and plane_shape[0] >= shape[0] and is_vocabulary(name)
            if plane_shape[1:] != shape[1:] or (plane_shape[0] != shape[0] and not padded):
                raise ValueError(f"{self.path}: {stored} is {stored_shape}, expected {shape} for each layer")
            if any(plane >= count for plane, count in zip(planes, stored_shape, strict=False)):
                raise ValueError(f"{self.path}: {stored} is {stored_shape}, too few for {name}")
            if padded:
                self._check_padding(stored, shape[0])
            most = stacks.get(stored, (0,) * len(planes))
            stacks[stored] = tuple(max(count, plane + 1) for count, plane in zip(most, planes, strict=True))
        self._check_nothing_more(stacks)

    def _check_padding(self, stored: str, vocabulary: int) -> None:
        """Refuses more rows than padding explains: a multiple of 128 times as many ranks as the rows are cut for.

        Ranks hold equal parts; our own writer cuts those once more, for their size.
        """
        rows = self._shapes[stored][0]
        starts = {spans[0][0] for _, spans, _ in self._reader.chunks(stored)}
        counts = [n for n in range(1, len(starts) + 1) if rows % n == 0 and starts >= {*range(0, rows, rows // n)}]
        multiple = _VOCABULARY_MULTIPLE * max(counts, default=1)
        if rows - vocabulary >= multiple:
            raise ValueError(
                f"{self.path}: {stored} has {rows:,} rows, more than padding makes of the vocab_size {vocabulary:,} of "
                f"{self.companions / 'config.json'} (to a multiple of {multiple:,}): take both "
                f"from the same model, or set vocab_size to {rows} there to keep all rows"
            )

    def _check_nothing_more(self, stacks: dict[str, tuple[int, ...]]) -> None:
        """Refuses what the model of the configuration does not have: it would be lost without a word."""
        config = self.companions / "config.json"
        for stored, stored_shape in self._shapes.items():
            if stored.startswith(_OF_THE_MODEL) and not stored.endswith(_STATE) and stored not in stacks:
                raise ValueError(
                    f"{self.path} holds {stored}, which the model of {config} does not have: take both from the same "
                    "model"
                )
            count = stacks.get(stored, ())
            if stored_shape[: len(count)] != count:
                raise ValueError(
                    f"{self.path}: {stored} is {stored_shape}, more layers or experts than the {count} of the model of "
                    f"{config}: take both from the same model"
                )

    def layout(self) -> dict[str, int] | None:
        return super().layout() or _layout(self.path, PROGRESS_FILE)  # of our conversion, or of a run

    def notes(self) -> dict[str, str]:
        padded = self._shapes["embedding.word_embeddings.weight"][0]
        notes = {"vocabulary": f"padded to {padded:,}"} if padded != self.model.vocab_size else {}
        try:
            if (layout := self.layout()) is not None:
                notes["layout"] = ", ".join(f"{axis} {size}" for axis, size in layout.items())
        except ModelFolderError as error:
            notes["layout"] = str(error)
        writers = {file.split("_")[2] for file in self.files if file.startswith("__") and file.count("_") >= 3}
        notes["files"] = f"{len(self.files)} hold the weights, written by {len(writers) or 'unknown'} ranks"
        return notes

    def tiles(self) -> list[Tile]:
        ranks, tiles = {file: rank for rank, file in enumerate(self.files)}, []
        for tile in self.model.megatron_tiles(whole()):
            stored, planes = self._places[tile.name]
            height = tile.rows[1] - tile.rows[0]
            width = 1 if tile.cols is None else tile.cols[1] - tile.cols[0]
            for _, spans, file in self._reader.chunks(stored, planes):
                if any(not a <= plane < b for plane, (a, b) in zip(planes, spans, strict=False)):
                    continue
                (r0, r1), (c0, c1) = (*spans[len(planes) :], (0, 1))[:2]
                r0, r1 = max(r0 - tile.row0, 0), min(r1 - tile.row0, height)
                c0, c1 = max(c0 - tile.col0, 0), min(c1 - tile.col0, width)
                if r0 < r1 and c0 < c1:
                    rows = (tile.rows[0] + r0, tile.rows[0] + r1)
                    cols = None if tile.cols is None else (tile.cols[0] + c0, tile.cols[0] + c1)
                    tiles.append(Tile(ranks[file], stored, tile.hf, rows, cols))
        return tiles

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        out = None
        for copy in self._copies[name]:
            (first, last), *columns = copy.target.index
            a, b = max(start, first), min(stop, last)
            if a >= b:
                continue
            stored, planes = self._places[copy.source.name]
            (row, _), *rest = copy.source.index
            index: Index = (*((p, p + 1) for p in planes), (row + a - first, row + b - first), *rest)
            part = self._reader.read(stored, index)[(0,) * len(planes)]
            if (a, b) == (start, stop) and (not columns or columns == [(0, self._wanted[name][1])]):
                return part
            if out is None:
                out = torch.empty((stop - start, *self._wanted[name][1:]), dtype=self.dtype)
            out[(slice(a - start, b - start), *(slice(*span) for span in columns))] = part
        assert out is not None, (name, start, stop)
        return out


def open_end(path: str | Path, like: str | Path | None = None, *, plan_only: bool = False) -> End:
    """Return the end that lies at `path`. ValueError if neither kind does; `like` as in MegatronEnd, and of it alone.

    With `plan_only` a folder that has a config.json and no weights at all is one too.
    """
    if torch_dist.is_checkpoint(path):
        return MegatronEnd(path, like)
    if (Path(path) / "config.json").is_file():
        if like is not None:
            raise ValueError(
                f"--like: of a checkpoint of Megatron, but {path} is a Hugging Face folder, which says itself what it "
                "holds; leave it out"
            )
        weights = (".safetensors", ".safetensors.index.json", *PICKLES)
        bare = not any(file.name.endswith(weights) for file in Path(path).iterdir())
        return ConfigEnd(path) if plan_only and bare else HuggingFaceEnd(path)
    if not Path(path).exists():
        raise ValueError(f"{path} does not exist: name a model's folder{how_to_download(path)}")
    raise ValueError(
        f"{path} is neither a Hugging Face folder (config.json and safetensors) nor a distributed checkpoint of "
        f"Megatron ({MARK} and .metadata)"
    )


def _layout(folder: Path, name: str) -> dict[str, int] | None:
    """The layout that a file of JSON names; None without one. ModelFolderError where the file is damaged."""
    layout = (read_record(folder, name) or {}).get("layout")
    if layout is not None and not isinstance(layout, dict):
        raise ModelFolderError(f"{folder / name}: layout is no JSON object: remove it if the weights are sound")
    return layout


def configured_dtype(model: Model) -> str | None:
    """Return the type that config.json gives the weights, "bfloat16"; None where it gives none."""
    name = model.config.get("dtype") or model.config.get("torch_dtype")
    return None if name is None else str(name).removeprefix("torch.")


def whole() -> ParallelLayout:
    """The layout whose one rank holds what a distributed checkpoint holds."""
    return ParallelLayout(fused_norms=True)


def local_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Names and shapes of that one rank."""
    return model.megatron_shapes(whole(), 0)


def is_vocabulary(name: str) -> bool:
    """Whether a Megatron parameter has a row a token: only those are padded, each checkpoint to its own size."""
    return name in ("embedding.word_embeddings.weight", _HEAD)


def global_place(name: str, *, stack_layers: bool = True) -> tuple[str, tuple[int, ...]]:
    """Where a checkpoint keeps a parameter of that one rank: the stacked tensor, and its place in the stack.

    Megatron stacks the layers (unless told not to), and in them the experts:
    decoder.layers.3.mlp.experts.local_experts.5.linear_fc1.weight is [3, 5] of
    decoder.layers.mlp.experts.experts.linear_fc1.weight.
    """
    layer, _, rest = name.partition("layers.")
    prefix = "" if stack_layers or not rest else layer + "layers." + rest.partition(".")[0]
    name = name.removeprefix(prefix)
    planes = tuple(int(number) for number in re.findall(r"\.(\d+)(?=\.)", name))
    stored = re.sub(r"\.\d+(?=\.)", "", name).replace(".local_experts.", ".experts.")
    return prefix + stored, planes
