"""An evaluation: the responses of engines that are there to each set of problems, their scores, and the lines of these.

evaluate.py says what is measured. Training evaluates through this too.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

from astar_megatron.algorithm import rewards
from astar_megatron.algorithm.estimators import majority, mean_and_error, pass_at_k
from astar_megatron.config import RunConfig, SamplingConfig
from astar_megatron.data.contract import digest_of
from astar_megatron.rollout.requests import evaluation_requests
from astar_megatron.rollout.source import Engines, RolloutSource
from astar_megatron.run.prepare import EvalSet, Inputs
from astar_megatron.run.scores import Estimate, Evaluation, Measure
from astar_megatron.run.tracking import Tracker
from astar_megatron.types import Rollout


def evaluate(
    cfg: RunConfig, inputs: Inputs, engines: Engines, tracker: Tracker, name: str
) -> Iterator[tuple[Evaluation, list[str]]]:
    """Evaluate what the engines hold, set by set: what each gave, and the lines of a file of its responses.

    They are the caller's to write, after the scores: those need the least room. Progress is shown under `name`.
    """
    for eval_set in inputs.eval_sets:
        with RolloutSource(engines, cfg.sampling, eval_set.reward, tracker.run_dir) as source:
            greedy = _draw(cfg.seed, eval_set, source, tracker, name, num_samples=None)
            sampled = _draw(cfg.seed, eval_set, source, tracker, name, eval_set.num_samples)
        lines = _lines(eval_set, greedy, greedy=True) + _lines(eval_set, sampled, greedy=False)
        yield summary(eval_set, _measure(eval_set, cfg.sampling), greedy, sampled), lines


def _measure(eval_set: EvalSet, sampling: SamplingConfig) -> Measure:
    asked = [rewards.version(eval_set.reward.name), *sorted(prompt.uid for prompt in eval_set.prompts)]
    return Measure(
        problems=eval_set.source,
        digest=digest_of(asked)[:16],
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_response_tokens=sampling.max_response_tokens,
    )


def summary(eval_set: EvalSet, measure: Measure, greedy: Sequence[Rollout], sampled: Sequence[Rollout]) -> Evaluation:
    """Return what scored rollouts say: a greedy one a problem, and its samples one after the other."""
    extract = rewards.extractor(eval_set.reward.name)
    everything = [*greedy, *sampled]
    formatted = [extract(rollout.text) is not None for rollout in everything] if extract else None
    count = eval_set.num_samples
    problems = [sampled[start : start + count] for start in range(0, len(sampled), count or 1)]
    values: defaultdict[str, list[float]] = defaultdict(list)
    for rollouts in problems:
        values[f"avg@{count}"].append(math.fsum(rollout.score for rollout in rollouts) / count)
        if extract is not None:
            values[f"maj@{count}"].append(_majority(rollouts, [extract(rollout.text) for rollout in rollouts]))
        right = sum(rollout.score >= 1 for rollout in rollouts)
        for k in sorted({*(2**i for i in range(count.bit_length())), count}):
            values[f"pass@{k}"].append(pass_at_k(count, right, k))
    return Evaluation(
        name=eval_set.name,
        reward=eval_set.reward.name,
        prompts=len(greedy),
        num_samples=count,
        greedy=Estimate(*mean_and_error([rollout.score for rollout in greedy])),
        sampled={name: Estimate(*mean_and_error(each)) for name, each in values.items()},
        truncated=sum(rollout.truncated for rollout in everything) / len(everything),
        formatted=sum(formatted) / len(formatted) if formatted else None,
        measure=measure,
    )


def show(title: str, evaluations: Sequence[Evaluation], tracker: Tracker) -> None:
    """Show evaluations."""
    for evaluation in evaluations:
        tracker.table(f"evaluation of {title}, {evaluation.title}, per cent", evaluation.rows())


def _draw(
    run_seed: int, eval_set: EvalSet, source: RolloutSource, tracker: Tracker, name: str, num_samples: int | None
) -> list[Rollout]:
    """Scored rollouts without their tokens, problem by problem; greedy ones where no number of samples is given."""
    if num_samples == 0:
        return []
    requests = evaluation_requests(run_seed, eval_set.name, eval_set.prompts, num_samples)
    label = f"{name}, {eval_set.name}, {f'{num_samples} samples' if num_samples else 'greedy'}"
    scored: dict[int, Rollout] = {}
    with tracker.progress(label, len(requests)) as advance:
        for pairs in source.ask(requests).scored():
            # The tokens of many long samples are gigabytes, beside training, and nothing reads them.
            scored |= {number: replace(rollout, token_ids=(), token_logprobs=()) for number, rollout in pairs}
            advance(len(pairs))
    return [scored[number] for number in sorted(scored)]


def _lines(eval_set: EvalSet, rollouts: Sequence[Rollout], *, greedy: bool) -> list[str]:
    extract = rewards.extractor(eval_set.reward.name)
    rows = (
        {
            "uid": rollout.prompt.uid,
            "prompt": rollout.prompt.text,
            "answer": rollout.prompt.answer,
            "sample": "greedy" if greedy else rollout.sample,
            "response": rollout.text,
            "extracted": extract(rollout.text) if extract else None,
            "reward": rollout.reward,
            "truncated": rollout.truncated,
        }
        for rollout in rollouts
    )
    return [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]


def _majority(rollouts: Sequence[Rollout], answers: Sequence[str | None]) -> float:
    groups: defaultdict[str, list[float]] = defaultdict(list)
    for rollout, answer in zip(rollouts, answers, strict=True):
        if answer is not None:
            groups[answer].append(rollout.score)
    return majority([(len(group), math.fsum(group) / len(group)) for group in groups.values()])
