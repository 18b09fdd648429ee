"""PROGRAM: train the policy by the method of the run; of A*PO it is stage 2, one on-policy rollout a prompt.

The driver is one plain process; Megatron ranks and vLLM engines are Ray actors. The same command run again continues
from the newest checkpoint. SIGTERM and SIGUSR1 end a run where a step is saved (cluster/signals.py).
"""

from astar_megatron import config
from astar_megatron.cluster.errors import ActorLost
from astar_megatron.cluster.signals import StepEnds
from astar_megatron.config import RunConfig
from astar_megatron.data.estimates import Estimates
from astar_megatron.exports import card
from astar_megatron.exports.provenance import Training
from astar_megatron.rollout.source import RolloutSource
from astar_megatron.rollout.training import TrainingRollouts
from astar_megatron.run import scores
from astar_megatron.run.certificate import certify
from astar_megatron.run.evaluation import evaluate, show
from astar_megatron.run.fleet import Fleet
from astar_megatron.run.garbage import collect_seldom
from astar_megatron.run.prepare import Inputs, prepare
from astar_megatron.run.profiles import profiled
from astar_megatron.run.record import Record, record_of
from astar_megatron.run.steps import batch_of, health_of, step_options
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
    check_training(cfg, inputs, estimates)
    tracker = Tracker(cfg.run_dir)
    collect_seldom()
    with Fleet(cfg, inputs.model, tracker) as fleet:
        train_whatever_dies(cfg, inputs, estimates, fleet, tracker)


def train_whatever_dies(
    cfg: RunConfig, inputs: Inputs, estimates: Estimates | None, fleet: Fleet, tracker: Tracker
) -> None:
    """As `train`, which begins again at the newest checkpoint when a rank has died."""
    while True:
        try:
            return train(cfg, inputs, estimates, fleet, tracker)
        except KeyboardInterrupt:
            words = checkpoints_of(cfg, inputs).newest_in_words()
            tracker.say(f"interrupted; the same command goes on {words}")
            raise
        except ActorLost as error:
            fleet.restart_policy(error)
            checkpoints_of(cfg, inputs).verify()


def train(cfg: RunConfig, inputs: Inputs, estimates: Estimates | None, fleet: Fleet, tracker: Tracker) -> None:
    """Train on what `stage_1` found and export; the engines keep the final weights."""
    objective = objective_of(cfg, estimates)
    prompts = prompt_stream(cfg, inputs, estimates, objective)
    checkpoints, options = checkpoints_of(cfg, inputs), step_options(cfg)
    with fleet.training(Clock()):  # where both sides share memory the policy has all of its own
        first = checkpoints.resume(fleet.policy, prompts, objective, tracker.say)
    with (
        record_of(cfg, inputs.model, tracker, first, estimates, fleet.engines.detokenize) as record,
        StepEnds(cfg.train.grace_seconds) as ends,
        checkpoints.saves(fleet.policy, tracker.say) as saves,
    ):
        with RolloutSource(fleet.engines, cfg.sampling, cfg.reward, tracker.run_dir) as source:
            batches = TrainingRollouts(
                source,
                prompts,
                cfg.rollout,
                cfg.seed,
                versions=range(first, cfg.train.num_steps),
                group_size=cfg.group_size,
                drawn=checkpoints.in_flight(inputs.prompts),
            )
            spending = record.spending
            for step in ends.steps(spending.steps()):
                clock = Clock(record.board.now)
                if objective.refreshes_reference(step):
                    fleet.policy.refresh_reference()
                with fleet.generating(step, clock, batches.while_publishing):
                    evaluated = _evaluate(cfg, inputs, fleet, tracker, step, clock, is_due=spending.has_reached_a_part)
                    source.take_idle_seconds()  # what came before was a publish, an evaluation or a checkpoint
                    rollouts = batches.take(step, clock.span)
                batch = batch_of(rollouts, objective, step)
                profile = profiled(step, cfg.train.profile_steps, fleet.policy, tracker.run_dir, tracker.say)
                with fleet.training(clock), clock.span("train"), profile:
                    stats = fleet.policy.step(batch, objective.loss, options)
                    clock.note_ended(stats.spans)
                health = health_of(objective, rollouts, batch, stats, options.mini_batch_size)
                objective.learn(rollouts, health)
                clock.note("generate", "engines", source.take_busy())
                clock.note("checkpoint", "driver", saves.take_waits())
                clock.note("record", "driver", record.take_writes())
                seconds = {"checkpoint": 0.0, "record": 0.0, **clock.stop(), "engines_idle": source.take_idle_seconds()}
                record.add(rollouts, batch, stats, health, seconds, evaluated | clock.timeline() | fleet.measured())
                if (step + 1) % cfg.checkpoint.interval == 0 or spending.ends or ends.asked:
                    saves.begin(step + 1, batches, objective)
                    if ends.asked:
                        saves.finish()
                        ends.saved(step + 1)
                saves.poll()
        _finish(cfg, inputs, fleet, record)


def _finish(cfg: RunConfig, inputs: Inputs, fleet: Fleet, record: Record) -> None:
    """Say what ended the run, publish the last weights, evaluate them if asked to, and export them."""
    version, tracker = record.spending.done, record.tracker
    fleet.engines.drop_requests()  # that were asked for ahead of steps which a budget leaves out
    for words in record.spending.reached:
        tracker.say(words)
    is_due = cfg.eval.interval is not None or record.spending.has_reached_a_part
    with fleet.generating(version, Clock()):
        evaluated = _evaluate(cfg, inputs, fleet, tracker, version, Clock(), is_due=is_due)
    record.dashboards.show_final(version, evaluated)
    with tracker.waiting(f"exporting to {cfg.export_dir}"):
        fleet.export(cfg.export_dir)
        agreement = certify(cfg.export_dir, fleet.policy.logprobs)
    rounding = "; rounded to bfloat16 it loses small changes: examples/BFLOAT16.md" * (fleet.policy.dtype == "float32")
    tracker.say(f"exported to {cfg.export_dir}: {agreement}{rounding}")
    run = Training.of_run(config.flat(cfg), version, tracker.run_dir, checkpoints_of(cfg, inputs).earlier_settings())
    tracker.say(card.write(cfg.export_dir, run, tracker.run_dir))


def _evaluate(
    cfg: RunConfig, inputs: Inputs, fleet: Fleet, tracker: Tracker, version: int, clock: Clock, *, is_due: bool
) -> dict[str, object]:
    """Evaluate where it is due, and every `eval.interval` versions; returns what the step's metrics get of it."""
    interval = cfg.eval.interval
    if not is_due and (interval is None or version % interval):
        return {}
    with clock.span("eval", "engines"):
        name = scores.name_of_step(version)
        evaluated = list(evaluate(cfg, inputs, fleet.engines, tracker, name))
        evaluations = [evaluation for evaluation, _ in evaluated]
        show(f"the policy after {version} steps", evaluations, tracker)
        scores.write(tracker.run_dir, version, evaluations)
        for evaluation, responses in evaluated:
            scores.write_responses(tracker.run_dir, scores.file_name(name, evaluation.name), responses)
    return {"eval": {evaluation.name: evaluation.metrics() for evaluation in evaluations}}
