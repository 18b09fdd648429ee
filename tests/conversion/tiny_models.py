"""Small models for the tests of conversion/: configurations, random weights, local tensors of a layout, HF folders."""

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from conversion.families import Model, model_from_config
from conversion.plan import WeightPlan
from conversion.tiles import ParallelLayout, Tile
from conversion.transfer.buckets import BUCKET_BYTES
from conversion.transfer.shared_memory import SharedMemoryReceiver, SharedMemorySender, weight_file

World = dict[int, dict[str, Tensor]]  # rank -> local tensors


LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# What each family's configuration has beside the sizes.
FAMILIES: dict[str, dict[str, object]] = {
    "llama": {"architectures": ["LlamaForCausalLM"]},
    "llama3": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "rope_parameters": LLAMA3 | {"original_max_position_embeddings": 24},
    },
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": None, "head_dim": 10},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 16},
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "head_dim": 16,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "norm_topk_prob": True,
    },
}


def config(family: str = "llama", **changes: object) -> dict[str, object]:
    """A small configuration in which no two sizes are equal."""
    sizes = {
        "num_hidden_layers": 2,
        "hidden_size": 48,
        "intermediate_size": 56,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 131,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }
    return sizes | {"model_type": family} | FAMILIES[family] | changes


EXPERTS = model_from_config(config("qwen3_moe", num_hidden_layers=3))


@st.composite
def models(draw: st.DrawFn) -> Model:
    """Models that tensor sizes 1, 2 and 4 divide, with 1 to 3 query heads a group, and vocabularies of any size."""
    kv_heads = draw(st.sampled_from([1, 2, 4, 8]))
    heads = math.lcm(kv_heads * draw(st.integers(1, 3)), 8)
    family = draw(st.sampled_from(sorted(FAMILIES)))
    sizes: dict[str, object] = {
        "num_hidden_layers": draw(st.sampled_from([1, 2, 3, 6, 8])),
        "hidden_size": heads * draw(st.sampled_from([2, 6])),
        "intermediate_size": 8 * draw(st.integers(1, 5)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": draw(st.integers(9, 200)),
        "tie_word_embeddings": draw(st.booleans()),
    }
    if family.startswith("qwen3"):
        sizes["head_dim"] = draw(st.sampled_from([2, 4, 10]))
    elif family != "qwen2":
        sizes["head_dim"] = draw(st.sampled_from([None, 2, 4]))
    if family == "qwen3_moe":
        experts = draw(st.sampled_from([2, 4, 6]))
        sizes |= {"num_experts": experts, "num_experts_per_tok": draw(st.integers(1, experts))}
        sizes |= {"moe_intermediate_size": 8 * draw(st.integers(1, 3)), "norm_topk_prob": False}
    return model_from_config(config(family, **sizes))


def layouts() -> st.SearchStrategy[ParallelLayout]:
    """Layouts on every axis; `fits` says whether a model can be laid out so."""
    return st.builds(
        lambda replicas, virtual, pipeline, expert, context, **rest: ParallelLayout(
            data=max(1, replicas * expert // context),
            context=context,
            expert=expert,
            pipeline=pipeline,
            virtual=virtual if pipeline > 1 else 1,
            **rest,
        ),
        replicas=st.sampled_from([1, 2]),
        context=st.sampled_from([1, 1, 2]),
        virtual=st.sampled_from([1, 1, 2]),
        pipeline=st.sampled_from([1, 2, 3]),
        expert=st.sampled_from([1, 1, 2]),
        tensor=st.sampled_from([1, 2, 4]),
        fused_norms=st.booleans(),
        vocabulary_multiple=st.sampled_from([1, 8]),
    )


def fits(model: Model, layout: ParallelLayout) -> bool:
    """Whether `layout` divides the model's sizes."""
    try:
        model.megatron_shapes(layout, 0)
    except ValueError:
        return False
    return True


def megatron_world(model: Model, layout: ParallelLayout) -> World:
    """What all ranks of a layout hold, before anything is in it."""
    return empty_world({rank: model.megatron_shapes(layout, rank) for rank in range(layout.world_size)})


def vllm_world(model: Model, tensor: int, dtype: torch.dtype = torch.float32) -> World:
    """What all workers of an engine hold, before anything is in it."""
    return empty_world({rank: model.vllm_shapes(tensor, rank) for rank in range(tensor)}, dtype)


def random_weights(model: Model, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random HF parameters."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=generator) * 0.1 + (1 if len(shape) == 1 else 0)).to(dtype)
        for name, shape in model.parameters().items()
    }


def empty_world(shapes: Mapping[int, Mapping[str, tuple[int, ...]]], dtype: torch.dtype = torch.float32) -> World:
    """Local tensors of all ranks, filled with NaN."""
    return {
        rank: {name: torch.full(shape, math.nan, dtype=dtype) for name, shape in tensors.items()}
        for rank, tensors in shapes.items()
    }


def carried(
    weights: WeightPlan,
    source: World,
    target: World,
    folder: Path,
    dtype: torch.dtype,
    bucket_bytes: int = BUCKET_BYTES,
) -> int:
    """Carries a plan out through real senders and receivers, all at once; the most bytes a source rank held."""
    senders = [
        SharedMemorySender(weights, rank, tensors, folder, dtype, bucket_bytes=bucket_bytes, timeout_seconds=20)
        for rank, tensors in source.items()
    ]
    receivers = [
        SharedMemoryReceiver(weights, rank, tensors, folder, dtype, bucket_bytes=bucket_bytes, timeout_seconds=20)
        for rank, tensors in target.items()
    ]
    at_once([end.send for end in senders] + [end.receive for end in receivers])
    held_bytes = max(weight_file(folder, rank).stat().st_size for rank in source)
    for end in (*receivers, *senders):
        end.close()
    return held_bytes


def at_once(calls: Sequence[Callable[[], object]]) -> None:
    """Runs all of them at the same time, a thread each; the first error in their order, once all have ended."""
    with ThreadPoolExecutor(len(calls)) as threads:
        for running in [threads.submit(call) for call in calls]:
            running.result()


def reference_world(tiles: Sequence[Tile], weights: Mapping[str, Tensor], world: World) -> World:
    """Fills `world` by the definition of a tile, one by one: no plan, no transfer."""
    for tile in tiles:
        part = weights[tile.hf][slice(*tile.rows)]
        rows = slice(tile.row0, tile.row0 + part.shape[0])
        local = world[tile.rank][tile.name]
        if tile.plane is not None:
            local = local[tile.plane]
        if tile.cols is None:
            local[rows] = part
        else:
            part = part[:, slice(*tile.cols)]
            local[rows, tile.col0 : tile.col0 + part.shape[1]] = part
    return world


def assert_equal_worlds(world: World, expected: World) -> None:
    """Bitwise equality of all tensors; padding is NaN on both sides."""
    assert world.keys() == expected.keys()
    for rank, tensors in expected.items():
        assert world[rank].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(world[rank][name].nan_to_num(7.0), tensor.nan_to_num(7.0)), (rank, name)


def write_folder(folder: Path, model: Model, weights: Mapping[str, Tensor]) -> Path:
    """An HF folder of one file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.config))
    save_file(dict(weights), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def cached(source: Path, folder: Path, subfolder: str = "") -> Path:
    """Return a model's folder as the hub's cache in `folder` keeps it: links to files that lie beside it."""
    blobs, snapshot = (folder / "models--Org--Base-1B" / name for name in ("blobs", f"snapshots/0a1b/{subfolder}"))
    snapshot.mkdir(parents=True)
    shutil.copytree(source, blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(os.path.relpath(path, snapshot))
    return snapshot
