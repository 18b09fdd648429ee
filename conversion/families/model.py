"""`Model`: one architecture at one size, and its tiles in every layout."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from conversion.families.config import Family, RopeScaling
from conversion.families.rows import Dimensions, Row, Shape, Shard, rounded_up
from conversion.tiles import Cell, ParallelLayout, Tile, share


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What an HF configuration describes. Pure: no weights, no torch.

    `config` is the plain dict of config.json; a process that gets it as JSON rebuilds an equal model from it.
    """

    family: Family
    config: dict[str, Any]
    dims: Dimensions

    def __hash__(self) -> int:
        return hash((self.architecture, self.dims))  # a dict, as `config` is, has none

    @property
    def architecture(self) -> str:
        """HF's class name."""
        return self.family.architecture

    @property
    def tied(self) -> bool:
        """True if the LM head is the embedding."""
        return self.dims.tied

    @property
    def num_layers(self) -> int:
        return self.dims.num_layers

    @property
    def hidden_size(self) -> int:
        return self.dims.hidden_size

    @property
    def vocab_size(self) -> int:
        return self.dims.vocab_size

    def padded_vocab_size(self, layout: ParallelLayout) -> int:
        """The vocabulary Megatron's embedding and head are built with in this layout."""
        return rounded_up(self.dims.vocab_size, layout.tensor * layout.vocabulary_multiple)

    def parameters(self) -> dict[str, Shape]:
        """HF names and shapes; a tied head is absent."""
        shapes = {}
        for row in self.family.rows:
            for i in range(self.num_layers) if row.stage == "every layer" else (0,):
                shapes |= {hf.replace("{i}", str(i)): shape for hf, shape in row.hf_shapes(self.dims).items()}
        return shapes

    def num_parameters(self) -> int:
        """Parameters of the model, a tied head counted once."""
        return sum(math.prod(shape) for shape in self.parameters().values())

    def transformer_config(self) -> dict[str, Any]:
        """Keyword arguments of Megatron's TransformerConfig that describe the architecture and nothing else.

        `activation` is the exception: the name of the activation function, for the caller to look up.
        """
        dims = self.dims
        return {
            "num_layers": dims.num_layers,
            "hidden_size": dims.hidden_size,
            "num_attention_heads": dims.num_heads,
            "num_query_groups": dims.num_kv_heads,
            "kv_channels": dims.head_dim,
            "ffn_hidden_size": dims.intermediate_size,
            "normalization": "RMSNorm",
            "layernorm_epsilon": float(self.config["rms_norm_eps"]),
            "gated_linear_unit": True,
            "activation": "silu",
            "add_bias_linear": False,
            "add_qkv_bias": False,
            "qk_layernorm": False,
            "rotary_interleaved": False,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            **self.family.transformer_options(self.config, dims),
        }

    def gpt_options(self) -> dict[str, Any]:
        """Keyword arguments of Megatron's GPTModel; `vocab_size` is unpadded: see `padded_vocab_size`.

        Rope scaling is not among them, see `rope_scaling`.
        """
        theta = self.family.rope(self.config).theta
        return {
            "vocab_size": self.dims.vocab_size,
            "max_sequence_length": self.config["max_position_embeddings"],
            "share_embeddings_and_output_weights": self.tied,
            "rotary_base": int(theta) if theta.is_integer() else theta,
            "rotary_percent": 1.0,
        }

    def rope_scaling(self) -> RopeScaling | None:
        """How Llama 3 stretches the rotary frequencies; None for most models.

        Not a part of `gpt_options`: GPTModel takes the factor only and fixes the three other numbers.
        """
        return self.family.rope(self.config).scaling

    def computation(self) -> dict[str, Any]:
        """What it computes with besides its weights, as plain JSON, by config.json's names; all families have all."""
        config, dims, options = self.family.renamed(self.config), self.dims, self.transformer_config()
        rope, experts = self.family.rope(config), bool(dims.num_experts)
        return {
            "num_hidden_layers": dims.num_layers,
            "hidden_size": dims.hidden_size,
            "intermediate_size": None if experts else dims.intermediate_size,  # no layer has that one
            "vocab_size": dims.vocab_size,
            "num_attention_heads": dims.num_heads,
            "num_key_value_heads": dims.num_kv_heads,
            "head_dim": dims.head_dim,
            "tie_word_embeddings": dims.tied,
            "num_experts": dims.num_experts,
            "num_experts_per_tok": dims.experts_per_token,
            "moe_intermediate_size": dims.moe_intermediate_size,
            "norm_topk_prob": config["norm_topk_prob"] if experts else None,
            "rms_norm_eps": options["layernorm_epsilon"],
            "rope_theta": rope.theta,
            "rope_scaling": None if rope.scaling is None else asdict(rope.scaling),
            "qkv_bias": options["add_qkv_bias"],
            "qk_norm": options["qk_layernorm"],
        }

    def hf_tiles(self) -> list[Tile]:
        """The trivial tiling: every parameter whole, on rank 0, under its own name."""
        return [
            Tile(0, name, name, (0, shape[0]), (0, shape[1]) if len(shape) == 2 else None)
            for name, shape in self.parameters().items()
        ]

    def megatron_tiles(self, layout: ParallelLayout, ranks: Iterable[int] | None = None) -> list[Tile]:
        """The tiles of ranks of `layout` (none named: all, replicas included). ValueError if a size does not divide.

        To plan a transfer from all, take `layout.senders()`; what a rank itself gets are its own alone.
        """
        shards: dict[Cell, list[tuple[str, int, Shard]]] = {}
        tiles = []
        for rank in range(layout.world_size) if ranks is None else ranks:
            if (cell := layout.cell(rank)) not in shards:
                shards[cell] = list(self._megatron_shards(cell))
            for name, layer, shard in shards[cell]:
                tiles += _placed(rank, name, layer, shard)
        return tiles

    def megatron_shapes(self, layout: ParallelLayout, rank: int) -> dict[str, Shape]:
        """Names and full local shapes, padding included, of what `rank` holds."""
        return {name: shard.shape for name, _, shard in self._megatron_shards(layout.cell(rank))}

    def vllm_tiles(self, tensor: int) -> list[Tile]:
        """The tiles of all workers of one vLLM engine; a tied head is the embedding's storage and has none."""
        tiles = []
        for t in range(tensor):
            for name, layer, shard in self._vllm_shards(tensor, t):
                tiles += _placed(t, name, layer, shard)
        return tiles

    def vllm_shapes(self, tensor: int, rank: int) -> dict[str, Shape]:
        """Names and full local shapes, padding included, of what worker `rank` holds."""
        return {name: shard.shape for name, _, shard in self._vllm_shards(tensor, rank)}

    def _megatron_shards(self, cell: Cell) -> Iterator[tuple[str, int, Shard]]:
        """(local name, layer in the model, shard) of all that lies in `cell`."""
        layout = cell.layout
        if layout.expert > 1 and not self.dims.num_experts:
            raise ValueError(f"expert={layout.expert}: {self.architecture} has no experts; choose expert=1")
        share(self.num_layers, layout.pipeline, cell.pipeline, "num_hidden_layers", "pipeline")
        chunks = layout.pipeline * layout.virtual
        for chunk in range(layout.virtual):
            # Interleaved: the chunks go round the stages, and each is a run of layers.
            position = chunk * layout.pipeline + cell.pipeline
            layers = range(*share(self.num_layers, chunks, position, "num_hidden_layers", "pipeline * virtual"))
            prefix = f"model{chunk}." if layout.virtual > 1 else ""
            for row in self.family.rows:
                if self._is_in_chunk(row, position, chunks):
                    for name, shard in row.megatron_shards(self.dims, cell):
                        for n, i in enumerate(layers) if row.stage == "every layer" else [(0, 0)]:
                            yield prefix + name.replace("{n}", str(n)), i, shard

    def _is_in_chunk(self, row: Row, position: int, chunks: int) -> bool:
        if row.tied_to and self.tied and chunks == 1:
            return False  # the head is the embedding itself; in a last chunk of its own it is a second copy
        return row.stage == "every layer" or position == (0 if row.stage == "first" else chunks - 1)

    def _vllm_shards(self, tensor: int, t: int) -> Iterator[tuple[str, int, Shard]]:
        for row in self.family.rows:
            if row.tied_to and self.tied:
                continue
            shard = row.vllm_shard(self.dims, tensor, t)
            for i in range(self.num_layers) if row.stage == "every layer" else (0,):
                yield (row.vllm or row.hf).replace("{i}", str(i)), i, shard


def model_of(family: Family, config: Mapping[str, Any]) -> Model:
    """The model `config` describes, which `family` must be the family of. UnsupportedModelError as `Family.check`."""
    renamed = family.renamed(config)
    family.check(renamed)
    dims = family.dimensions(renamed)
    family.transformer_options(renamed, dims)  # what Megatron cannot do is refused here too
    return Model(family=family, config=dict(config), dims=dims)


def contrast(left: Mapping[str, Any], right: Mapping[str, Any]) -> str:
    """In words where two `Model.computation`s differ, "" where they don't; what only one of them has is left out."""
    keys = [key for key in left if key in right and left[key] != right[key]]
    return "; ".join(f"{key} {left[key]!r} and {right[key]!r}" for key in keys)


def _placed(rank: int, name: str, layer: int, shard: Shard) -> list[Tile]:
    i = str(layer)
    return [Tile(rank, name, b.hf.replace("{i}", i), b.rows, b.cols, b.row0, b.col0, b.plane) for b in shard.blocks]
