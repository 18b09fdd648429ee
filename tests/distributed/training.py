"""What the rank processes of test_training.py do."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from ranks import save_checkpoint


@dataclass(frozen=True)
class Run:
    """A policy, how it is trained and on what."""

    model_path: str
    batches: Any
    optim: dict[str, Any] = field(default_factory=dict)
    axes: dict[str, Any] = field(default_factory=dict)
    dtype: Literal["bfloat16", "float32"] = "float32"
    mini_batch_size: int = 8
    micro_batch_tokens: int = 60
    optimizer_steps: int = 10
    reference: str = "resident"
    importance_cap: float | None = None
    scale: Literal["paper", "pg"] = "paper"
    load: str | None = None
    save: str | None = None
    profiles: str | None = None  # the folder of every step's traces


@dataclass(frozen=True)
class Trained:
    """What one rank saw: the statistics of each step, a digest of its state before the first and after each."""

    stats: list[Any]
    digests: list[str]
    moved: float  # norm of the weights' change by the whole run
    changed: set[str]  # names of the weights it changed
    ratios: dict[str, tuple[float, float]]  # smallest and largest of after / before
    reason: str


def trained(
    pipe: Any, rank: int, port: int | None, *, run: Run, tamper: Callable[[Any], None] | None = None
) -> Trained:
    """Train; `tamper` gets the started policy before the first step."""
    from astar_megatron.algorithm.astar import AstarLoss
    from astar_megatron.config import OptimConfig, ParallelConfig
    from astar_megatron.model.options import PolicyOptions
    from astar_megatron.model.policy import PolicyRank
    from astar_megatron.types import StepOptions

    optim: dict[str, Any] = {"lr": 1e-3, "clip_grad": 0.0, "weight_decay": 0.1} | run.optim
    policy_options = PolicyOptions(
        model_path=run.model_path,
        dtype=run.dtype,
        parallel=ParallelConfig(**run.axes),
        optim=OptimConfig(**optim),
        optimizer_steps=run.optimizer_steps,
        seed=0,
        reference=run.reference,
    )
    policy = PolicyRank(rank, policy_options)
    if rank == 0:
        port = policy.listen("127.0.0.1")
        pipe.send(port)
    assert port is not None
    reason = policy.start("127.0.0.1", port)
    try:
        if run.load:
            policy.load(run.load, run.batches[0].version)
        if tamper:
            tamper(policy)
        options = StepOptions(
            temperature=0.8,
            mini_batch_size=run.mini_batch_size,
            micro_batch_tokens=run.micro_batch_tokens,
        )
        loss = AstarLoss(beta2=0.05, importance_cap=run.importance_cap, scale=run.scale)
        before = {name: weight.clone() for name, weight in policy.weights().items()}
        stats, digests = [], [_digest(policy)]
        for batch in run.batches:
            if run.profiles:
                policy.begin_profile()
            stats.append(policy.step(batch, loss, options))
            if run.profiles:
                assert not policy.end_profile(run.profiles, batch.version).problem
            digests.append(_digest(policy))
        if run.save:
            save_checkpoint(policy, run.save)
        return Trained(stats, digests, *_moved(before, policy.weights()), reason)
    finally:
        policy.close()


def _moved(before: Any, after: Any) -> tuple[float, set[str], dict[str, tuple[float, float]]]:
    squares = sum(float((after[name] - before[name]).double().square().sum()) for name in before)
    changed = {name for name in before if bool((after[name] != before[name]).any())}
    ratios = {}
    for name in before:
        ratio = (after[name] / before[name])[before[name] != 0]
        if len(ratio):
            ratios[name] = (float(ratio.min()), float(ratio.max()))
    return squares**0.5, changed, ratios


def _digest(policy: Any) -> str:
    """Of this rank's weights, and of all that optimizer and schedule hold."""
    import torch

    digest = hashlib.sha256()
    for name, weight in sorted(policy.weights().items()):
        digest.update(name.encode() + weight.contiguous().view(-1).view(torch.uint8).clone().numpy().tobytes())
    for inner in policy._learning.optimizer.chained_optimizers:
        for group in inner.optimizer.param_groups:
            for parameter in group["params"]:
                digest.update(parameter.detach().clone().numpy().tobytes())
                for name, value in sorted(inner.optimizer.state[parameter].items()):
                    digest.update(name.encode() + value.clone().numpy().tobytes())
    digest.update(str(policy._learning.schedule.state_dict()["num_steps"]).encode())
    return digest.hexdigest()


def shift_a_weight(policy: Any) -> None:
    policy.weights()["decoder.final_layernorm.weight"].add_(0.01)


def turn_the_reference(policy: Any) -> None:
    """Other rotary angles with the same weights: as kernels that compute another function would."""
    policy._reference._modules[0].rotary_pos_emb.inv_freq.mul_(1.1)


def spoil_a_weight(policy: Any) -> None:
    policy.weights()["decoder.final_layernorm.weight"][3] = float("nan")
