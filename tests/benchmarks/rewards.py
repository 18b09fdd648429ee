"""Seconds to score 20,000 responses: in this process, and through the processes that runs use. Prints JSON.

    python tests/benchmarks/rewards.py [--responses 20000] [--rounds 5] [--reward NAME ...] [--out FILE]

Responses are solutions of about 700 characters, half of them right; every reward gets them in its own form. The
processes run before the clock starts; seconds are the median of the rounds. `load_average` is the machine's before it.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from astar_megatron.algorithm import rewards
from astar_megatron.config import RewardConfig
from astar_megatron.rollout.scoring import Scorer
from astar_megatron.types import Prompt, Rollout

THOUGHT = "She sells 16 - 3 - 4 = <<16-3-4=9>>9 eggs a day, so she makes 9 * 2 = $18, that is $1,018.50 in all. "
FORMS = {  # reward -> the end of a response that answers {}, the gold answer 18
    "gsm8k_strict": ("\n#### {}", "long solution\n#### 18"),
    "gsm8k_flexible": ("\n#### {}", "long solution\n#### 18"),
    "last_number": ("The answer is {}.", "18"),
    "math": ("So it is $\\boxed{{\\dfrac{{{}}}{{7}}}}$.", r"\frac{18}{7}"),
    "countdown": ("<answer>({} - 8) * 4</answer>", '{"numbers": [18, 8, 4], "target": 40}'),
    "multiply": ("<answer>{}</answer>", "18"),
}


def rollouts(name: str, count: int) -> list[Rollout]:
    ending, answer = FORMS[name]
    prompt = Prompt(uid="u", token_ids=(1,), text="How much?", answer=answer)
    return [
        Rollout(
            prompt=prompt,
            sample=i,
            seed=i,
            token_ids=(1,),
            text=THOUGHT * 7 + ending.format(18 if i % 2 else 17),
            truncated=False,
            token_logprobs=(0.0,),
            first_version=0,
            last_version=0,
        )
        for i in range(count)
    ]


def seconds(rounds: int, call: Callable[[], object]) -> float:
    spent = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        spent.append(time.perf_counter() - start)
    return round(statistics.median(spent), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--reward", action="append", choices=FORMS, help="repeatable; default: all")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    report: dict[str, object] = {
        "responses": arguments.responses,
        "characters": len(rollouts("gsm8k_strict", 1)[0].text),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 1),
    }
    for name in arguments.reward or FORMS:
        drawn, reward = rollouts(name, arguments.responses), rewards.get(name)
        row = {"here": seconds(arguments.rounds, lambda: [reward(r.text, r.prompt.answer) for r in drawn])}  # noqa: B023
        for processes in (1, 2):
            with Scorer(RewardConfig(name=name), num_processes=processes) as scorer:
                scored = scorer.score(drawn)
                assert sum(rollout.reward == 1 for rollout in scored) == arguments.responses // 2
                row[f"{processes}_processes"] = seconds(arguments.rounds, lambda: scorer.score(drawn))  # noqa: B023
        report[name] = row
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
