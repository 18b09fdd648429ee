"""A run folder to look at, of steps that nobody computed: metrics, timelines and rollouts as training writes them."""

import dataclasses
import math
import random
from array import array
from pathlib import Path
from typing import Any

import samples
from rich.console import Console

from astar_megatron.data.rollout_files import RolloutFiles
from astar_megatron.run.steps import metrics_of
from astar_megatron.run.tracking import Tracker
from astar_megatron.types import Prompt, Rollout, Span

HOSTILE = "</script><script>document.title='pwned'</script><img src=x onerror=\"document.title='pwned'\">\u202e"
_WORDS = ["Let", " me", " count", ":", " 12", " plus", " 30", " is", " 42", ".", " So", " the", " answer", " is", " 42"]


def write_run(folder: Path, *, steps: int = 12, batch: int = 8, words: int = 15, keep: int | None = None) -> Path:
    """Write a run and return its folder; the last response of step 0 is HOSTILE."""
    tracker, chance = Tracker(folder, Console(quiet=True)), random.Random(0)
    vocabulary = [*_WORDS, HOSTILE, ""]
    files = RolloutFiles(folder, keep, lambda token_ids: "".join(vocabulary[token] for token in token_ids))
    files.begin(0)
    tracker.begin(0)
    for step in range(steps):
        progress = step / max(1, steps - 1)
        rollouts = [_rollout(step, number, words, progress, chance, vocabulary) for number in range(batch)]
        if not step:
            rollouts[-1] = dataclasses.replace(
                rollouts[-1], token_ids=(15, 16), text=HOSTILE, token_logprobs=(-1.0, -1.0)
            )
        count = sum(len(rollout.token_ids) for rollout in rollouts)
        reference = array("f", [chance.uniform(-3.0, 0.0) for _ in range(count)])
        policy = array("f", [value + chance.gauss(0.1, 1.2) * progress for value in reference])
        seconds, spans = _timeline(chance)
        stats = dataclasses.replace(
            samples.STATS,
            token_logprobs=policy,
            reference_token_logprobs=reference,
            tokens=3 * count,
            response_tokens=count,
            loss=0.3 - 0.2 * progress + chance.gauss(0, 0.01),
            skipped=(),
            spans=tuple(span for span in spans if span.who == "ranks" and span.name != "publish"),
        )
        files.write(step, rollouts, stats)
        timeline = [(span.name, span.who, round(span.start, 4), round(span.end, 4)) for span in spans]
        line = metrics_of(step, rollouts, _health(progress, chance), stats, (step + 1) * count, seconds)
        tracker.log(line | {"timeline": timeline} | ({"eval": _scores(progress)} if step % 4 == 0 else {}))
    return folder


def _rollout(
    step: int, number: int, words: int, progress: float, chance: random.Random, vocabulary: list[str]
) -> Rollout:
    a, b = chance.randrange(10, 60), chance.randrange(10, 60)
    text = f"user: What is {a} + {b}?\nassistant:"
    prompt = Prompt(uid=f"{a}-{b}", token_ids=(1, 2, 3), text=text, answer=str(a + b))
    length = max(3, int(words * chance.uniform(0.6, 1.4)))
    truncated = chance.random() < 0.1
    token_ids = (*(place % len(_WORDS) for place in range(length)), *(() if truncated else (16,)))
    return samples.rollout(
        prompt,
        sample=number,
        token_ids=token_ids,
        text="".join(vocabulary[token] for token in token_ids),
        truncated=truncated,
        token_logprobs=(-0.5,) * len(token_ids),
        first_version=step,
        last_version=step,
        reward=1.0 if chance.random() < 0.3 + 0.6 * progress else 0.0,
    )


def _health(progress: float, chance: random.Random) -> dict[str, float]:
    def near(value: float) -> float:
        return value + chance.gauss(0, 0.02)

    spread = 1.5 * progress
    return {
        "slope": near(0.8 * progress),
        "r_squared": near(0.6 * progress**2),
        "residual_mean": near(0.0),
        "residual_std": near(0.45 - 0.1 * progress),
        "logratio_mean": near(0.3 * progress),
        "logratio_p05": near(-spread),
        "logratio_p50": near(0.25 * progress),
        "logratio_p95": near(1.5 * spread),
        "logratio_max": near(2 * spread),
        "kl_token": abs(near(0.01 * progress)),
        "entropy": near(0.9 - 0.3 * progress),
        "engine_gap": near(0.0),
        "engine_gap_max": abs(near(0.1)),
        "v_star_mean": near(0.6),
        "v_star_shift": 0.0,
        "unstable_share": math.nan,
    }


def _scores(progress: float) -> dict[str, Any]:
    return {"prompts": {"greedy": 0.4 + 0.5 * progress, "greedy_error": 0.05}}


def _timeline(chance: random.Random) -> tuple[dict[str, float], list[Span]]:
    parts = {"publish": 0.6, "generate": 6.0, "score": 0.3, "train": 4.2}
    parts = {name: seconds * chance.uniform(0.85, 1.15) for name, seconds in parts.items()}
    spans, time = [Span(name="checkpoint", who="driver", start=-0.8, end=-0.1)], 0.1
    for name, seconds in parts.items():
        spans.append(Span(name=name, who="driver", start=time, end=time + seconds))
        if name == "publish":
            spans += [dataclasses.replace(spans[-1], who="ranks"), dataclasses.replace(spans[-1], who="engines")]
        if name == "generate":
            spans.append(dataclasses.replace(spans[-1], who="engines"))
        time += seconds + 0.02
    spans.append(Span(name="reference", who="ranks", start=time - 4.0, end=time - 2.9))
    spans.append(Span(name="policy", who="ranks", start=time - 2.9, end=time - 0.05))
    seconds = {**parts, "checkpoint": 0.7, "total": time, "engines_idle": time - parts["generate"] - 0.6}
    return seconds, spans
