"""Stage 2 of A*PO: regress beta2 * ln(pi / pi_ref) on r - V*, one on-policy rollout a prompt (arXiv 2505.20686).

The driver is one plain process; Megatron ranks and vLLM engines are Ray actors. The same command run again continues
from the newest checkpoint.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from astar_megatron import config
from astar_megatron.checkpoints import Checkpoints
from astar_megatron.cluster.policy_group import PolicyGroup
from astar_megatron.config import RunConfig
from astar_megatron.data.prompts import PromptStream
from astar_megatron.data.v_star import VStarTable
from astar_megatron.evaluate import evaluate, show
from astar_megatron.rollout.pool import EnginePool, seed_of
from astar_megatron.rollout.scoring import Scorer, gather
from astar_megatron.run import Inputs, prepare, started
from astar_megatron.tracking import Clock, Tracker, read_metrics
from astar_megatron.types import Prompt, Rollout, RolloutBatch, StepOptions, StepStats
from astar_megatron.weights import TransferFolder, WeightSync
from conversion import folders


def main(cfg: RunConfig) -> None:
    """Train from the V* table of the run and export the result to `<run_dir>/hf`."""
    inputs = prepare(cfg)
    VStarTable.open(cfg.table_dir, inputs.contract).estimate(cfg.astar.beta1, inputs.prompts, cfg.sweep.num_samples)
    check(cfg, inputs)
    tracker = Tracker(cfg.run_dir)
    with started(cfg, tracker) as (policy, engines):
        train(cfg, inputs, policy, engines, tracker)


def check(cfg: RunConfig, inputs: Inputs) -> None:
    """Raise ValueError where training could not go on from what the run has written, or not export in the end."""
    prompts = PromptStream(inputs.prompts, cfg.train.batch_size, cfg.seed)
    done = Checkpoints(Path(cfg.run_dir), cfg.checkpoint, inputs.contract, config.flat(cfg)).restore(prompts)
    if done > cfg.train.num_steps:
        raise ValueError(
            f"train.num_steps: {cfg.train.num_steps}, but the newest checkpoint of {cfg.run_dir} was written after "
            f"{done} steps; raise it, choose a new run_dir, or write the name of an earlier step_* folder into "
            f"{cfg.run_dir}/checkpoints/latest"
        )
    read_metrics(cfg.run_dir)  # damaged ones are refused here
    folders.check_destination(cfg.export_dir)


def train(cfg: RunConfig, inputs: Inputs, policy: PolicyGroup, engines: EnginePool, tracker: Tracker) -> None:
    """Train with a started policy and pool, and export; leaves the final weights in the engines."""
    v_star = VStarTable.open(cfg.table_dir, inputs.contract).estimate(
        cfg.astar.beta1, inputs.prompts, cfg.sweep.num_samples
    )
    prompts = PromptStream(inputs.prompts, cfg.train.batch_size, cfg.seed)
    checkpoints = Checkpoints(tracker.run_dir, cfg.checkpoint, inputs.contract, config.flat(cfg))
    options = StepOptions(
        beta2=cfg.astar.beta2,
        temperature=cfg.sampling.temperature,
        mini_batch_size=cfg.mini_batch_size,
        micro_batch_tokens=cfg.train.micro_batch_tokens,
    )
    first = checkpoints.resume(policy, prompts)
    if changed := checkpoints.changed_settings():
        tracker.say(f"continuing after step {first} with other settings than before: {'; '.join(changed)}")
    tracker.begin(first)
    with TransferFolder() as folder, Scorer(cfg.reward, tracker.run_dir) as scorer:
        weights = WeightSync(policy, engines, inputs.model, folder.path, cfg.conversion)
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
            stats = policy.step(_batch(rollouts, v_star, step), options)
            metrics = _metrics(step, rollouts, v_star, stats, clock.stop()) | evaluated
            tracker.log(metrics)
            tracker.say(_line(metrics, cfg.train.num_steps))
            if (step + 1) % cfg.checkpoint.interval == 0 or step + 1 == cfg.train.num_steps:
                checkpoints.save(policy, step + 1, prompts)
        weights.publish(version=cfg.train.num_steps)
        _evaluate(cfg, inputs, engines, tracker, cfg.train.num_steps, Clock())
    with TransferFolder() as folder:
        policy.export(cfg.export_dir, folder.path)
    tracker.say(f"exported to {cfg.export_dir}")


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


def _work(prompts: Sequence[Prompt], seed: int, step: int) -> list[tuple[Prompt, int, int]]:
    """One rollout a prompt. A prompt that a batch across two epochs holds twice gets two samples."""
    seen: Counter[str] = Counter()
    work = []
    for prompt in prompts:
        sample = seen[prompt.uid]
        seen[prompt.uid] += 1
        work.append((prompt, sample, seed_of(seed, "train", step, prompt.uid, sample)))
    return work


def _batch(rollouts: Sequence[Rollout], v_star: dict[str, float], version: int) -> RolloutBatch:
    """The rollouts as the policy needs them; all must come from the weights it has now."""
    stale = {rollout.version for rollout in rollouts} - {version}
    if stale:
        raise AssertionError(f"rollouts of versions {sorted(stale)} in a step of version {version}")
    return RolloutBatch(
        token_ids=tuple(rollout.prompt.token_ids + rollout.token_ids for rollout in rollouts),
        prompt_tokens=tuple(len(rollout.prompt.token_ids) for rollout in rollouts),
        reward=torch.tensor([rollout.reward for rollout in rollouts], dtype=torch.float64),
        v_star=torch.tensor([v_star[rollout.prompt.uid] for rollout in rollouts], dtype=torch.float64),
        rollout_logprob=torch.tensor([rollout.logprob for rollout in rollouts], dtype=torch.float64),
        version=version,
    )


def _metrics(
    step: int, rollouts: Sequence[Rollout], v_star: dict[str, float], stats: StepStats, seconds: dict[str, float]
) -> dict[str, object]:
    count = len(rollouts)
    return {
        "step": step,
        "version": step,
        "reward_mean": sum(rollout.reward or 0.0 for rollout in rollouts) / count,
        "v_star_mean": sum(v_star[rollout.prompt.uid] for rollout in rollouts) / count,
        "loss": stats.loss,
        "grad_norm": stats.grad_norm,
        "logratio_mean": stats.logratio_mean,
        "logratio_std": stats.logratio_std,
        "logratio_max": stats.logratio_max,
        "slope": stats.slope,
        "r_squared": stats.r_squared,
        "engine_gap": stats.engine_gap,
        "truncated": sum(rollout.truncated for rollout in rollouts) / count,
        "tokens": stats.tokens,
        "response_tokens": stats.response_tokens,
        "seconds": {**stats.seconds, **seconds},
    }


def _line(metrics: dict[str, object], num_steps: int) -> str:
    seconds: dict[str, float] = metrics["seconds"]  # type: ignore[assignment]
    spans = " ".join(f"{name} {seconds[name]:.1f}" for name in ("generate", "reference", "policy", "publish"))
    return (
        f"step {metrics['step']:>3} of 0..{num_steps - 1}  reward {metrics['reward_mean']:.3f}  "
        f"loss {metrics['loss']:.4f}  log-ratio {metrics['logratio_mean']:+.2f}  {seconds['total']:.1f} s ({spans})"
    )
