"""Stage 2 of A*PO: regress beta2 * ln(pi / pi_ref) on r - V*, one on-policy rollout a prompt (arXiv 2505.20686).

The driver is one plain process; Megatron ranks and vLLM engines are Ray actors. The same command run again continues
from the newest checkpoint.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from astar_megatron import config, resources
from astar_megatron.algorithm.astar import Astar
from astar_megatron.algorithm.objective import Objective
from astar_megatron.algorithm.refresh import LiveVStar
from astar_megatron.certificate import certify
from astar_megatron.checkpoints import Checkpoints
from astar_megatron.cluster.policy_group import PolicyGroup
from astar_megatron.config import FilterConfig, RunConfig
from astar_megatron.data import bad_batches, filters
from astar_megatron.data.allocation import samples_wanted
from astar_megatron.data.estimates import Estimates
from astar_megatron.data.header import MissingTableError
from astar_megatron.data.prompts import PromptStream
from astar_megatron.data.v_star import VStarTable
from astar_megatron.evaluate import evaluate, show
from astar_megatron.model import layouts
from astar_megatron.rollout.pool import EnginePool, seed_of
from astar_megatron.rollout.scoring import Scorer, gather
from astar_megatron.run import Inputs, check_ranks, prepare, started
from astar_megatron.tracking import Clock, Tracker, read_metrics
from astar_megatron.types import Prompt, Rollout, RolloutBatch, StepOptions, StepStats
from astar_megatron.weights import TransferFolder, WeightSync
from conversion import folders


class NotFiniteError(ValueError):
    """Too many optimiser steps were left out; the message names where their batches lie."""


def main(cfg: RunConfig) -> None:
    """Train from the V* table of the run and export the result to `<run_dir>/hf`."""
    inputs = prepare(cfg)
    found = stage_1(cfg, inputs)
    check(cfg, inputs)
    tracker = Tracker(cfg.run_dir)
    with started(cfg, tracker) as (policy, engines):
        train(cfg, inputs, found, policy, engines, tracker)


def check(cfg: RunConfig, inputs: Inputs) -> None:
    """Raise ValueError where training could not go on from what the run has written, or not export in the end."""
    needs_stage_1 = cfg.filter != FilterConfig() or cfg.astar.refresh_decay is not None
    found = stage_1(cfg, inputs) if needs_stage_1 else None
    checkpoints = Checkpoints(Path(cfg.run_dir), cfg.checkpoint, inputs.contract, config.flat(cfg))
    done = checkpoints.restore(_stream(cfg, inputs, found), _objective(cfg, found))
    if done > cfg.train.num_steps:
        raise ValueError(
            f"train.num_steps: {cfg.train.num_steps}, but the newest checkpoint of {cfg.run_dir} was written after "
            f"{done} steps; raise it, choose a new run_dir, or write the name of an earlier step_* folder into "
            f"{cfg.run_dir}/checkpoints/latest"
        )
    _check_places(cfg, inputs)


def _check_places(cfg: RunConfig, inputs: Inputs) -> None:
    """Raise ValueError where what a run writes has no place."""
    read_metrics(cfg.run_dir)  # damaged ones are refused here
    folders.check_destination(cfg.export_dir)
    resources.check_disk(cfg, inputs.model.num_parameters())


def say_fit(cfg: RunConfig) -> None:
    """Say what a run needs of this machine. Raises ValueError, as `main` would, where it can't start or go on here."""
    inputs = prepare(cfg)
    shares = check_ranks(cfg)
    try:
        stage_1(cfg, inputs)
    except MissingTableError:
        done = "stage 1 is still to be done"
        _check_places(cfg, inputs)
    else:
        done = "stage 1 is done"
        check(cfg, inputs)
    need = resources.needs(cfg, 4 * inputs.model.num_parameters(), resources.measure())
    print(
        f"this run can start here: {len(inputs.prompts)} prompts, {inputs.model.num_parameters():,} parameters; "
        f"{done}; policy on {layouts.described(cfg.parallel)}; it needs at least "
        f"{need.memory_bytes / resources.GIB:.1f} GiB of memory and {need.shared_bytes / resources.GIB:.1f} "
        "GiB of /dev/shm, activations on top"
    )
    if shares:
        print(shares.describe())


def train(
    cfg: RunConfig, inputs: Inputs, found: Estimates, policy: PolicyGroup, engines: EnginePool, tracker: Tracker
) -> None:
    """Train on what `stage_1` found, with a started policy and pool, and export; the engines keep the final weights."""
    objective = _objective(cfg, found)
    prompts = _stream(cfg, inputs, found)
    checkpoints = Checkpoints(tracker.run_dir, cfg.checkpoint, inputs.contract, config.flat(cfg))
    options = _step_options(cfg)
    first = checkpoints.resume(policy, prompts, objective)
    if changed := checkpoints.changed_settings():
        tracker.say(f"continuing after step {first} with other settings than before: {'; '.join(changed)}")
    bad_batches.set_aside(tracker.run_dir, first)
    earlier = tracker.begin(first)
    skipped = sum(line.get("skipped_steps", 0) for line in earlier)
    spent = int(found.tokens.sum()) + sum(line.get("response_tokens", 0) for line in earlier)
    with TransferFolder() as folder, Scorer(cfg.reward, tracker.run_dir) as scorer:
        weights = WeightSync(policy, engines, inputs.model, folder.path, cfg.conversion)
        tracker.say(f"weights go to the engines by {weights.reason}")
        for step in range(first, cfg.train.num_steps):
            clock = Clock()
            with clock.span("publish"):
                weights.publish(version=step)
            evaluated = _evaluate(cfg, inputs, engines, tracker, step, clock)
            with clock.span("generate"):
                work = _work(prompts.take(), cfg.seed, step)
                pending = [scorer.submit(finished) for finished in engines.generate(work, cfg.sampling)]
            with clock.span("score"):  # what generation did not hide
                rollouts = gather(pending)
            batch = _batch(rollouts, objective, step)
            stats = policy.step(batch, objective.loss, options)
            spent += stats.response_tokens
            health = _health(objective, rollouts, stats, options.mini_batch_size)
            metrics = _metrics(step, rollouts, health, stats, spent, clock.stop()) | evaluated
            objective.learn(rollouts)
            if stats.skipped:  # first on disk, then in the metrics
                skipped += len(stats.skipped)
                tracker.say(_keep(tracker.run_dir, rollouts, batch, stats, cfg))
            tracker.log(metrics)
            tracker.say(_line(metrics, cfg.train.num_steps))
            check_skipped(skipped, cfg.train.max_skipped_steps, tracker.run_dir)
            if (step + 1) % cfg.checkpoint.interval == 0 or step + 1 == cfg.train.num_steps:
                checkpoints.save(policy, step + 1, prompts, objective)
        weights.publish(version=cfg.train.num_steps)
        _evaluate(cfg, inputs, engines, tracker, cfg.train.num_steps, Clock())
    with TransferFolder() as folder:
        policy.export(cfg.export_dir, folder.path)
    rounding = "; to round float32 to bfloat16 loses small changes: examples/BFLOAT16.md" * (policy.dtype == "float32")
    tracker.say(f"exported to {cfg.export_dir}: {certify(cfg.export_dir, policy.logprobs)}{rounding}")


def check_skipped(skipped: int, limit: int, run_dir: Path) -> None:
    """Raise NotFiniteError where `skipped` optimiser steps of the run, `limit` or more, were left out."""
    if skipped >= limit:
        raise NotFiniteError(
            f"train.max_skipped_steps: a loss or a gradient was not finite {skipped} times, {limit} end the run; look "
            f"into {run_dir / bad_batches.FOLDER}, lower optim.lr or raise the key, and run the same command again"
        )


def _step_options(cfg: RunConfig) -> StepOptions:
    return StepOptions(
        temperature=cfg.sampling.temperature,
        mini_batch_size=cfg.mini_batch_size,
        micro_batch_tokens=cfg.train.micro_batch_tokens,
    )


def _evaluate(
    cfg: RunConfig, inputs: Inputs, engines: EnginePool, tracker: Tracker, version: int, clock: Clock
) -> dict[str, object]:
    """Evaluate every `eval.interval` versions and the last; returns what the step's metrics get of it."""
    interval = cfg.eval.interval
    if interval is None or (version % interval and version != cfg.train.num_steps):
        return {}
    with clock.span("eval"):
        found = evaluate(cfg, inputs, engines, tracker, f"eval_step_{version:08d}")
    show(f"the policy after {version} steps", found, tracker)
    return {"eval": {one.name: one.metrics() for one in found}}


def stage_1(cfg: RunConfig, inputs: Inputs) -> Estimates:
    """Return V* of the run's prompts, from the samples that belong to it. Raises MissingTableError, ContractError."""
    table = VStarTable.open(cfg.table_dir, inputs.contract)
    wanted = samples_wanted(table, inputs.prompts, cfg.sweep, cfg.astar.beta1)
    return table.estimate(cfg.astar.beta1, inputs.prompts, wanted)


def _stream(cfg: RunConfig, inputs: Inputs, found: Estimates | None) -> PromptStream:
    weights = filters.weights(found, cfg.filter) if found else None
    return PromptStream(inputs.prompts, cfg.train.batch_size, cfg.seed, weights)


def _objective(cfg: RunConfig, found: Estimates | None) -> Objective:
    first, samples = (found.by_uid(), found.samples_by_uid()) if found else ({}, {})
    v_star = LiveVStar(first, samples, cfg.astar.beta1, cfg.astar.refresh_decay)
    return Astar(cfg.astar, v_star, cfg.optim.loss_scale)


def _work(prompts: Sequence[Prompt], seed: int, step: int) -> list[tuple[Prompt, int, int]]:
    """One rollout a prompt. A prompt that a batch across two epochs holds twice gets two samples."""
    seen: Counter[str] = Counter()
    work = []
    for prompt in prompts:
        sample = seen[prompt.uid]
        seen[prompt.uid] += 1
        work.append((prompt, sample, seed_of(seed, "train", step, prompt.uid, sample)))
    return work


def _batch(rollouts: Sequence[Rollout], objective: Objective, version: int) -> RolloutBatch:
    """The rollouts as the policy needs them; all must come from the weights it has now."""
    stale = {rollout.version for rollout in rollouts} - {version}
    if stale:
        raise AssertionError(f"rollouts of versions {sorted(stale)} in a step of version {version}")
    columns = objective.columns(rollouts)
    return RolloutBatch(
        token_ids=tuple(rollout.prompt.token_ids + rollout.token_ids for rollout in rollouts),
        prompt_tokens=tuple(len(rollout.prompt.token_ids) for rollout in rollouts),
        columns=columns.sequences,
        token_columns=columns.tokens,
        version=version,
    )


def _keep(run_dir: Path, rollouts: Sequence[Rollout], batch: RolloutBatch, stats: StepStats, cfg: RunConfig) -> str:
    """Write a batch that spoiled a step to disk and return in words what happened."""
    folder = bad_batches.write(run_dir, rollouts, batch, stats, config.flat(cfg))
    return (
        f"step {batch.version}: a loss or a gradient was not finite in mini-batches {list(stats.skipped)}; their "
        f"optimiser steps were left out, weights and optimiser are as before; the batch is in {folder}"
    )


def _health(objective: Objective, rollouts: Sequence[Rollout], stats: StepStats, on_policy: int) -> dict[str, float]:
    """What the objective makes of a step, and how far the engines were; the first `on_policy` rollouts are of the
    weights that were scored."""
    logprobs = torch.tensor(stats.logprobs, dtype=torch.float64)
    reference = torch.tensor(stats.reference_logprobs, dtype=torch.float64)
    drawn = torch.tensor([rollout.logprob for rollout in rollouts], dtype=torch.float64)
    gap = float((logprobs - drawn)[:on_policy].mean())
    return {**objective.metrics(rollouts, logprobs, reference, on_policy), "engine_gap": gap}


def _metrics(
    step: int,
    rollouts: Sequence[Rollout],
    health: Mapping[str, float],
    stats: StepStats,
    spent_tokens: int,
    seconds: dict[str, float],
) -> dict[str, object]:
    count = len(rollouts)
    return {
        "step": step,
        "version": step,
        "reward_mean": sum(rollout.reward or 0.0 for rollout in rollouts) / count,
        "loss": stats.loss,
        "grad_norm": stats.grad_norm,
        "lr": stats.learning_rate,
        "changed_weights": stats.changed_weights,
        "skipped_steps": len(stats.skipped),
        **health,
        "truncated": sum(rollout.truncated for rollout in rollouts) / count,
        "tokens": stats.tokens,
        "response_tokens": stats.response_tokens,
        "tokens_per_second": stats.tokens_per_second,
        "model_flops": stats.model_flops,
        "mfu": stats.mfu,
        "peak_memory_bytes": list(stats.peak_memory_bytes),
        "spent_tokens": spent_tokens,
        "seconds": {**stats.seconds, **seconds},
    }


def _line(metrics: dict[str, object], num_steps: int) -> str:
    seconds: dict[str, float] = metrics["seconds"]  # type: ignore[assignment]
    spans = " ".join(f"{name} {seconds[name]:.1f}" for name in ("generate", "reference", "policy", "publish"))
    return (
        f"step {metrics['step']:>3} of 0..{num_steps - 1}  reward {metrics['reward_mean']:.3f}  "
        f"loss {metrics['loss']:.4f}  log-ratio {metrics['logratio_mean']:+.2f}  {seconds['total']:.1f} s ({spans})"
    )
