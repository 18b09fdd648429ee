"""PROGRAM: train the policy by the method of the run; of A*PO it is stage 2, one on-policy rollout a prompt.

The driver is one plain process; Megatron ranks and vLLM engines are Ray actors. The same command run again continues
from the newest checkpoint. SIGTERM and SIGUSR1 end a run where a step is saved (cluster/signals.py).
"""

from astar_megatron.cluster.signals import StepEnds
from astar_megatron.config import RunConfig
from astar_megatron.data import bad_batches
from astar_megatron.data.estimates import Estimates
from astar_megatron.rollout.source import RolloutSource
from astar_megatron.rollout.training import TrainingRollouts
from astar_megatron.run.certificate import certify
from astar_megatron.run.evaluation import evaluate, show
from astar_megatron.run.fleet import Fleet
from astar_megatron.run.prepare import Inputs, prepare
from astar_megatron.run.spending import Spending, generation_flops
from astar_megatron.run.steps import (
    batch_of,
    check_skipped,
    health_of,
    keep_bad_batch,
    line_of,
    metrics_of,
    skipped_of,
    step_options,
)
from astar_megatron.run.tracking import Clock, Tracker
from astar_megatron.run.training import (
    check_before_stage_1,
    check_training,
    checkpoints_of,
    objective_of,
    prompt_stream,
    stage_1,
)


def main(cfg: RunConfig) -> None:
    """Train from the V* table of the run and export the result to `<run_dir>/hf`."""
    inputs = prepare(cfg)
    check_before_stage_1(cfg, inputs)
    estimates = stage_1(cfg, inputs)
    check_training(cfg, inputs)
    tracker = Tracker(cfg.run_dir)
    with Fleet(cfg, inputs.model, tracker) as fleet:
        train(cfg, inputs, estimates, fleet, tracker)


def train(cfg: RunConfig, inputs: Inputs, estimates: Estimates | None, fleet: Fleet, tracker: Tracker) -> None:
    """Train on what `stage_1` found and export; the engines keep the final weights."""
    objective = objective_of(cfg, inputs, estimates)
    prompts = prompt_stream(cfg, inputs, estimates, objective)
    checkpoints, options = checkpoints_of(cfg, inputs), step_options(cfg)
    first = checkpoints.resume(fleet.policy, prompts, objective)
    if changed := checkpoints.changed_settings():
        tracker.say(f"continuing after step {first} with other settings than before: {'; '.join(changed)}")
    bad_batches.set_aside(tracker.run_dir, first)
    earlier = tracker.begin(first)
    skipped = sum(map(skipped_of, earlier))
    spent = (int(estimates.tokens.sum()) if estimates else 0) + sum(line.get("response_tokens", 0) for line in earlier)
    spending = Spending(cfg.budget, cfg.train.num_steps, first, earlier)
    versions = range(first, cfg.train.num_steps)
    with (
        StepEnds(cfg.train.grace_seconds) as ends,
        RolloutSource(fleet.engines, cfg.sampling, cfg.reward, tracker.run_dir) as source,
    ):
        batches = TrainingRollouts(source, prompts, cfg.rollout, cfg.seed, versions=versions, group_size=cfg.group_size)
        for step in ends.steps(spending.steps()):
            clock = Clock()
            if objective.refreshes_reference(step):
                fleet.policy.refresh_reference()
            with fleet.generating(step, clock, batches.while_publishing):
                evaluated = _evaluate(cfg, inputs, fleet, tracker, step, clock)
                source.idle_seconds()  # what came before was a publish, an evaluation or a checkpoint
                rollouts = batches.take(step, clock.span)
            batch = batch_of(rollouts, objective, step)
            with fleet.training():
                stats = fleet.policy.step(batch, objective.loss, options)
            spent += stats.response_tokens
            health = health_of(objective, rollouts, stats, step, options.mini_batch_size)
            seconds = clock.stop() | {"engines_idle": source.idle_seconds()}
            drawing = {"generation_flops": generation_flops(inputs.model, ((r.prompt, r.token_ids) for r in rollouts))}
            metrics = metrics_of(step, rollouts, health, stats, spent, seconds) | drawing | evaluated
            spending.add(metrics)
            objective.learn(rollouts, health)
            if stats.skipped:  # first on disk, then in the metrics
                tracker.say(keep_bad_batch(tracker.run_dir, rollouts, batch, stats, cfg))
            tracker.log(metrics)
            tracker.say(line_of(metrics, cfg.train.num_steps))
            skipped += skipped_of(metrics)
            check_skipped(skipped, cfg.train.max_skipped_steps, tracker.run_dir)
            if (step + 1) % cfg.checkpoint.interval == 0 or spending.ends or ends.asked:
                checkpoints.save(fleet.policy, step + 1, batches.state(), objective)
                ends.saved(step + 1)
        for words in spending.reached:
            tracker.say(words)
    _finish(cfg, inputs, fleet, tracker, spending.done)


def _finish(cfg: RunConfig, inputs: Inputs, fleet: Fleet, tracker: Tracker, version: int) -> None:
    """Publish the last weights, evaluate them if asked to, and export them."""
    with fleet.generating(version, Clock()):
        _evaluate(cfg, inputs, fleet, tracker, version, Clock(), is_last=True)
    fleet.export(cfg.export_dir)
    is_float32 = fleet.policy.dtype == "float32"
    rounding = "; to round float32 to bfloat16 loses small changes: examples/BFLOAT16.md" * is_float32
    tracker.say(f"exported to {cfg.export_dir}: {certify(cfg.export_dir, fleet.policy.logprobs)}{rounding}")


def _evaluate(
    cfg: RunConfig, inputs: Inputs, fleet: Fleet, tracker: Tracker, version: int, clock: Clock, *, is_last: bool = False
) -> dict[str, object]:
    """Evaluate every `eval.interval` versions and the last; returns what the step's metrics get of it."""
    interval = cfg.eval.interval
    if interval is None or (version % interval and not is_last):
        return {}
    with clock.span("eval"):
        evaluations = evaluate(cfg, inputs, fleet.engines, tracker, f"eval_step_{version:08d}")
    show(f"the policy after {version} steps", evaluations, tracker)
    return {"eval": {evaluation.name: evaluation.metrics() for evaluation in evaluations}}
