"""What a GPU alone can show of a policy on it, with or without Transformer Engine.

`make gpu-check` runs these; a test without its packages (transformers, megatron-core) is skipped by their names.
"""

import dataclasses
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("pydantic")
pytest.importorskip("yaml")
pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")
pytest.importorskip("transformers")
from ranks import save_checkpoint, write_gradients
from safetensors.torch import load_file
from test_layouts import batch, expected_step, sequences
from transformers import AutoModelForCausalLM

from astar_megatron.algorithm.astar import AstarLoss
from astar_megatron.config import OptimConfig, ParallelConfig
from astar_megatron.model.backend import FLOAT32_ENVIRONMENT
from astar_megatron.model.options import PolicyOptions
from astar_megatron.model.parking import Parking
from astar_megatron.types import RolloutBatch, StepOptions, StepStats

os.environ |= FLOAT32_ENVIRONMENT  # as a rank in float32 is started, before anything is multiplied on the GPU
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch sees none"),
]
MODELS = ["tied_llama", "untied_qwen2"]
DTYPES = ["float32", "bfloat16"]


@contextmanager
def policy(folder: Path, dtype: Any, *, offload: bool = False, **more: Any) -> Iterator[Any]:
    """A started PolicyRank on the only GPU."""
    pytest.importorskip("megatron")
    from astar_megatron.model.policy import PolicyRank  # takes seconds, and no machine without a GPU gets here

    fields: dict[str, Any] = {"optimizer_steps": 1} | more
    options = PolicyOptions(
        model_path=str(folder),
        dtype=dtype,
        parallel=ParallelConfig(),
        optim=OptimConfig(lr=1e-3, clip_grad=0.0, weight_decay=0.1, offload=offload),
        seed=0,
        **fields,
    )
    rank = PolicyRank(0, options)
    try:
        rank.start("127.0.0.1", rank.listen("127.0.0.1"))
        yield rank
    finally:
        rank.close()


def step(rank: Any, data: RolloutBatch) -> StepStats:
    options = StepOptions(temperature=0.8, mini_batch_size=len(data), micro_batch_tokens=60)
    return rank.step(data, AstarLoss(beta2=0.05), options)


@pytest.mark.parametrize("kind", MODELS)
def test_token_logprobs_equal_transformers_on_the_gpu(kind: str, request: pytest.FixtureRequest) -> None:
    assert not torch.backends.cuda.matmul.allow_tf32  # and Transformer Engine's is turned off above, or refused
    folder = request.getfixturevalue(kind)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.to("cuda")
    with policy(folder, "float32") as rank:
        for shared in (0, 5):
            token_ids, prompt_tokens = sequences(1, 9, shared)
            rows = rank.logprobs(token_ids, prompt_tokens)
            for ids, prompt, row in zip(token_ids, prompt_tokens, rows, strict=True):
                with torch.no_grad():
                    logprobs = model(torch.tensor([ids], device="cuda")).logits[0].log_softmax(-1)
                wanted = [float(logprobs[t - 1, ids[t]]) for t in range(prompt, len(ids))]
                assert row == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", MODELS)
def test_first_logratio_is_exactly_zero_on_the_gpu(kind: str, dtype: str, request: pytest.FixtureRequest) -> None:
    data = batch(5)
    with policy(request.getfixturevalue(kind), dtype) as rank:
        before = {name: weight.clone() for name, weight in rank.weights().items()}
        first = step(rank, data)
        assert first.logprobs == first.reference_logprobs
        residual = data.columns["v_star"] - data.columns["reward"]
        assert first.loss == pytest.approx(float(residual.square().mean()), abs=1e-6)
        changed = {name for name, weight in rank.weights().items() if not torch.equal(weight, before[name])}
        # A step of 1e-3 is less than half of what bfloat16 can add to the norms' weights, which are about 1.
        assert changed >= {name for name in before if dtype == "float32" or "norm" not in name}
        second = step(rank, dataclasses.replace(data, version=1))
        pairs = zip(second.logprobs, second.reference_logprobs, strict=True)
        assert max(abs(own - reference) for own, reference in pairs) > 0.01
        assert second.loss < first.loss


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_offloaded_reference_is_the_resident_one_and_leaves_the_gpu(
    dtype: str, tiny_family: Callable[..., Path]
) -> None:
    """With weights of 90 MB and more: libraries' own workspaces, of 32 MB each, come when they come."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "head_dim": 64}
    folder = tiny_family("mistral", **sizes, vocab_size=24575)
    steps, num_bytes, weights = {}, {}, 0
    for reference in ("resident", "offload"):
        num_bytes[reference], steps[reference], weights = added_bytes_and_steps(folder, dtype, reference)
    assert weights > 80 << 20
    assert num_bytes["resident"] - num_bytes["offload"] == pytest.approx(weights, rel=0.1)
    for resident, offloaded in zip(steps["resident"], steps["offload"], strict=True):
        assert resident.reference_logprobs == offloaded.reference_logprobs
        assert resident.mfu is None or 0 < resident.mfu < 1
        assert resident.peak_memory_bytes[0] > 0


def added_bytes_and_steps(folder: Path, dtype: str, reference: str) -> tuple[int, list[StepStats], int]:
    """Return the bytes on the GPU that a started rank adds, its first steps, and the bytes of its weights."""
    gc.collect()  # of the rank before this one
    before = torch.cuda.memory_allocated()
    with policy(folder, dtype, reference=reference) as rank:
        gc.collect()
        added_bytes = torch.cuda.memory_allocated() - before
        steps = [step(rank, dataclasses.replace(batch(5), version=version)) for version in range(2)]
        return added_bytes, steps, sum(weight.nbytes for weight in rank.weights().values())


@pytest.mark.parametrize("kind", MODELS)
def test_gradient_on_the_gpu_equals_the_formula_on_the_cpu(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """To 1e-4 of each parameter's gradient norm: float32 products in another order."""
    folder, data = request.getfixturevalue(kind), batch(2)
    with policy(folder, "float32") as rank:
        step(rank, data)
        write_gradients(rank, str(tmp_path / "gradients"))
    gradients = load_file(tmp_path / "gradients" / "model.safetensors")
    _, wanted = expected_step(folder, data)
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (gradients[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


@pytest.mark.parametrize(("dtype", "offload"), [*((dtype, False) for dtype in DTYPES), ("bfloat16", True)])
def test_checkpoint_and_export_on_the_gpu(dtype: str, offload: bool, tied_llama: Path, tmp_path: Path) -> None:
    batches = [batch(10 + version, version=version) for version in range(3)]
    with policy(tied_llama, dtype, offload=offload) as rank:
        rank.export(str(tmp_path / "start"), str(tmp_path))
        step(rank, batches[0])
        save_checkpoint(rank, str(tmp_path / "step_00000001"))
        saved = {name: weight.clone() for name, weight in rank.weights().items()}
        wanted = [step(rank, data).loss for data in batches[1:]]
    start, source = (load_file(folder / "model.safetensors") for folder in (tmp_path / "start", tied_llama))
    assert start.keys() == source.keys()
    for name, weight in source.items():
        assert torch.equal(start[name], weight.to(getattr(torch, dtype))), name
    with policy(tied_llama, dtype, offload=offload) as rank:
        rank.load(str(tmp_path / "step_00000001"), 1)
        for name, weight in rank.weights().items():
            assert torch.equal(weight, saved[name]), name
        assert [step(rank, data).loss for data in batches[1:]] == pytest.approx(wanted, rel=1e-4)


def test_backend_says_what_it_runs_on(tied_llama: Path) -> None:
    with policy(tied_llama, "float32") as rank:
        has_engine = find_spec("transformer_engine") is not None
        assert rank.backend.uses_transformer_engine == rank.layout.fused_norms == has_engine
        assert torch.cuda.get_device_name(0) in rank.backend.reason
        assert ("no Transformer Engine" in rank.backend.reason) == (not has_engine)


def test_host_memory_of_what_is_parked_has_its_size_and_is_taken_again() -> None:
    content = torch.arange(3 << 20, dtype=torch.int32, device="cuda")  # 12 MiB, no power of two
    parking = Parking(content.device, [])
    taken = []
    for _ in range(3):
        before = torch.cuda.host_memory_stats()["allocated_bytes.current"]
        assert parking.park([content]) == content.numel() * 4
        taken.append(torch.cuda.host_memory_stats()["allocated_bytes.current"] - before)
        parking.restore()
        assert bool((content == torch.arange(3 << 20, device="cuda")).all())
    # In a rank, which is told pinned_max_cached_size_mb; a process that was not rounds the first up.
    assert taken[1:] == [0, 0]
