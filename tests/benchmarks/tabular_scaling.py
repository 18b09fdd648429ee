"""Do the intervals of `astar scale fit` hold asymptotes that are known? 200 studies of tabular policies.

    .venv/bin/python tests/benchmarks/tabular_scaling.py --out tests/benchmarks/results/tabular_scaling.json

A policy is a table of logits [prompts, responses], trained by the project's A*PO loss on responses that it draws
itself, one a prompt and step, with V* of a sampled stage 1 that a study's seeds share. Strictly on policy V* drops out
of the expected gradient, whatever its error and beta1: it is -2 beta2 times that of E[r] - beta2 KL(pi || pi_ref). By
a logit that is pi (A - beta2 D - its mean), 0 at one policy only, pi_ref e^(r / beta2) / Z, and the expected reward of
that policy is the true asymptote. A constant learning rate leaves noise around it: `noise_floor` is how far expected
rewards of policies lie from the asymptote that begin at that point and train on.

Chosen before any study was run, and not changed since: the constants below. Rewards are 0 and 1 or graded, beta2 the
paper's or one at which the reference holds the policy back; a study ends anywhere from the early rise to the plateau.
A score is the mean of 512 fresh responses (tables can't generalise, so to the same prompts), at 25 points evenly in
compute; compute is counted in responses, with those of stage 1. The same policies are also scored by 16 times as many
responses and exactly, which takes the noise away and leaves what the law gets wrong. An exponent is not compared: these
curves are no sigmoids, and have none.

By the sigmoid of all points alone, as `astar scale fit` first had it, the intervals of studies 0 to 199 held the truth
in 79 of 123, and those of 200 to 399 in 77 of 127. The rule that extrapolation.py has now was chosen on these 400, from
fourteen; others that were tried: a law with an exponent more, a test of lack of fit, other parts of the curve. How the
least is searched for, what steps add by moving together, and that a sigmoid which misses the second half has no
asymptote, was mended later, for reasons that these studies had no part in. What runs add by how they differ was to be
added to the variance of a number or to multiply it: on studies 400 to 599 the second gave more intervals. So the result
is that of studies 600 to 799, which nothing was chosen on. It has the first rule's figures too.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from astar_megatron.algorithm.astar import AstarLoss
from astar_megatron.algorithm.objective import ResponseTokens
from astar_megatron.algorithm.value import pass_rate_interval, v_star
from astar_megatron.data.files import write_atomic
from astar_megatron.studies.extrapolation import extrapolate, sigmoid_numbers
from astar_megatron.studies.laws import CONSTANT, Points, fit
from astar_megatron.studies.spread import LEVEL

PROMPTS, RESPONSES, SEEDS = 32, 8, 3
BETA1, SAMPLES = 0.5, 8  # of stage 1
BETAS2, REWARDS = (1e-3, 0.1, 0.3), ("0 and 1", "graded")
RIGHT = 0.6  # a response of which the graded reward is above has reward 1, as in tests/algorithm
RATE = 0.05  # a step moves the logits of a prompt by it times the gradient of E[r] - beta2 KL
SHORTEST, LONGEST = 100, 8000  # steps of a study, even in the logarithm
POINTS = 24  # scores after the untrained policy's
DRAWN = {"512 responses": 16, "8192 responses": 256, "exact": None}  # responses a prompt of a score; the first counts
FLOOR_STEPS = 2000
TOLERANCE = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Studies:
    """Studies [S] of one beta2, longest first, and what their policies were at each score."""

    beta2: float
    number: Tensor  # [S]
    rewards: Tensor  # [S, prompts, responses]
    asymptote: Tensor  # [S]
    noise_floor: Tensor  # [S]
    compute: Tensor  # [S, scores], responses
    policies: Tensor  # [S, scores, seeds, prompts, responses], probabilities


def trained(beta2: float, number: Tensor) -> Studies:
    """Run studies of one beta2; each is what its number says, whichever others are run beside it."""
    tables = [_table(int(each)) for each in number]
    horizon = torch.stack([steps for _, _, steps in tables])
    order = horizon.argsort(descending=True)
    reference = torch.stack([reference for reference, _, _ in tables])[order]
    rewards = torch.stack([rewards for _, rewards, _ in tables])[order]
    number, horizon = number[order], horizon[order]
    random = torch.Generator().manual_seed(round(beta2 * 1e6))
    value = v_star(_drawn_rewards(reference, rewards, random), BETA1)
    best = (reference + rewards / beta2).log_softmax(-1)
    asymptote = _expected(best.exp(), rewards)
    scored = (horizon[:, None] * torch.arange(POINTS + 1) / POINTS).round().long()  # [S, scores], steps before each
    policies = torch.zeros(len(number), POINTS + 1, SEEDS, PROMPTS, RESPONSES, dtype=torch.float64)
    logits = reference[:, None].repeat(1, SEEDS, 1, 1)
    for step in range(int(horizon.max()) + 1):
        at, score = (scored == step).nonzero(as_tuple=True)
        policies[at, score] = logits[at].softmax(-1)
        active = int((horizon > step).sum())  # the first ones
        _train(logits[:active], reference[:active], rewards[:active], value[:active], beta2, random)
    floor, total = best[:, None].repeat(1, SEEDS, 1, 1), torch.zeros(len(number), dtype=torch.float64)
    for _ in range(FLOOR_STEPS):
        _train(floor, reference, rewards, value, beta2, random)
        total += _expected(floor.softmax(-1), rewards[:, None]).mean(-1)
    return Studies(
        beta2=beta2,
        number=number,
        rewards=rewards,
        asymptote=asymptote,
        noise_floor=total / FLOOR_STEPS - asymptote,
        compute=PROMPTS * (SAMPLES + scored),
        policies=policies,
    )


def _table(number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of the reference and rewards of a study, and how many steps it has."""
    random = torch.Generator().manual_seed(number)
    shape = (PROMPTS, RESPONSES)
    reference = torch.randn(shape, generator=random, dtype=torch.float64).log_softmax(-1)
    rewards = torch.rand(shape, generator=random, dtype=torch.float64)
    if kind_of(number)[1] == REWARDS[0]:
        rewards = (rewards > RIGHT).double()
    share = torch.rand((), generator=random, dtype=torch.float64)
    return reference, rewards, (SHORTEST * (LONGEST / SHORTEST) ** share).round().long()


def kind_of(number: int) -> tuple[float, str]:
    """Return beta2 and the rewards of a study."""
    return BETAS2[number % len(BETAS2)], REWARDS[number // len(BETAS2) % len(REWARDS)]


def _drawn_rewards(reference: Tensor, rewards: Tensor, random: torch.Generator) -> Tensor:
    """Rewards [S, prompts, samples] of stage 1."""
    drawn = torch.multinomial(reference.exp().flatten(0, 1), SAMPLES, replacement=True, generator=random)
    return rewards.gather(-1, drawn.view(*reference.shape[:-1], SAMPLES))


def _train(
    logits: Tensor, reference: Tensor, rewards: Tensor, value: Tensor, beta2: float, random: torch.Generator
) -> None:
    """Take a step of A*PO, in place, with the logits [S, seeds, prompts, responses]: one response a prompt."""
    policy = logits.detach().log_softmax(-1)
    below = policy.exp().cumsum(-1) < torch.rand((*logits.shape[:-1], 1), generator=random, dtype=torch.float64)
    drawn = below.sum(-1, keepdim=True).clamp(max=RESPONSES - 1)

    def of_drawn(table: Tensor) -> Tensor:
        return table[:, None].expand_as(logits).gather(-1, drawn).flatten()

    logprobs = policy.gather(-1, drawn).flatten().requires_grad_()
    tokens = ResponseTokens(
        logprobs=logprobs,
        reference_logprobs=of_drawn(reference),
        lengths=(1,) * len(logprobs),
        sum_tokens=lambda values: values,  # a response is a token
    )
    columns = {"reward": of_drawn(rewards), "v_star": value[:, None].expand(logits.shape[:-1]).flatten()}
    loss = AstarLoss(beta2=beta2, scale="pg")
    (gradient,) = torch.autograd.grad(loss(tokens, columns).sum() * loss.gradient_scale, logprobs)
    # of ln softmax: the response drawn, less the policy
    gradient = gradient.view(drawn.shape)
    logits -= RATE * (torch.zeros_like(logits).scatter_(-1, drawn, gradient) - gradient * policy.exp())


def _expected(policy: Tensor, rewards: Tensor) -> Tensor:
    """Expected reward [...] of probabilities [..., prompts, responses]."""
    return (policy * rewards).sum(-1).mean(-1)


def scores_of(studies: Studies, responses: int | None, random: np.random.Generator) -> np.ndarray:
    """Return scores [S, seeds, scores] of so many fresh responses a prompt; None: the expected rewards."""
    policies, rewards = studies.policies, studies.rewards[:, None, None]
    if responses is not None:
        chances = policies.numpy()
        chances = chances / chances.sum(-1, keepdims=True)
        policies = torch.from_numpy(random.multinomial(responses, chances) / responses)
    return _expected(policies, rewards).transpose(1, 2).numpy()


def judged(studies: Studies, scores: np.ndarray) -> list[dict[str, Any]]:
    """Return what `astar scale fit` says of each study's asymptote, beside the truth."""
    rows = []
    for at, number in enumerate(studies.number.tolist()):
        compute = np.tile(studies.compute[at].double().numpy(), SEEDS)
        points = Points(compute, scores[at].ravel(), np.repeat(np.arange(SEEDS), POINTS + 1))
        result = extrapolate(str(number), points, TOLERANCE)
        asymptote, truth = result.laws[0].numbers["asymptote"], float(studies.asymptote[at])
        all_points = None
        if whole := result.laws[0].whole:
            span = float(np.ptp(points.score))
            all_points = sigmoid_numbers(whole, fit(CONSTANT, points), span)["asymptote"].interval
        rows.append(
            {
                "study": number,
                "beta2": studies.beta2,
                "rewards": kind_of(number)[1],
                "responses": int(studies.compute[at, -1]),
                "truth": truth,
                "last": float(_expected(studies.policies[at, -1], studies.rewards[at]).mean()),
                "noise_floor": float(studies.noise_floor[at]),
                "asymptote": asymptote.value,
                "interval": asymptote.interval,
                "interval_of_all_points": all_points,
                "refusal": asymptote.refusal,
                "verdict": result.verdict,
                "nearest_law": result.best.law if result.best else None,
            }
        )
    return rows


def coverage(rows: Sequence[dict[str, Any]], interval: str = "interval") -> dict[str, Any]:
    """Return in what share of the intervals given the truth lies, with its exact interval, and what was refused."""
    given = [(*row[interval], row["truth"]) for row in rows if row[interval] is not None]
    holds = sum(low <= truth <= high for low, high, truth in given)
    tree: dict[str, Any] = {"studies": len(rows), "refused": len(rows) - len(given), "given": len(given)}
    if given:
        ends = pass_rate_interval(torch.tensor([holds]), torch.tensor([len(given)]), LEVEL)
        tree |= {"hold": holds, "share": holds / len(given), "share_interval": [float(end[0]) for end in ends]}
        tree["too_low"] = sum(high < truth for _, high, truth in given)
        tree["too_high"] = sum(low > truth for low, _, truth in given)
        tree["median_width"] = float(np.median([high - low for low, high, _ in given]))
    return tree


def measured(first: int, number: int) -> dict[str, list[dict[str, Any]]]:
    """Run so many studies and return what is said of them, by how they were scored."""
    numbers = torch.arange(first, first + number)
    groups = [trained(beta2, numbers[numbers % len(BETAS2) == at]) for at, beta2 in enumerate(BETAS2)]
    rows = {}
    for name, responses in DRAWN.items():
        random = np.random.default_rng(first)
        own = [row for group in groups for row in judged(group, scores_of(group, responses, random))]
        rows[name] = sorted(own, key=lambda row: row["study"])
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the coverage of all studies and of each kind, and what it would be by the fit to all points alone."""
    kinds = sorted({(row["beta2"], row["rewards"]) for row in rows})
    own = {kind: [row for row in rows if (row["beta2"], row["rewards"]) == kind] for kind in kinds}
    return {
        "all": coverage(rows),
        "by_kind": {f"beta2 {beta2:g}, rewards {rewards}": coverage(own[beta2, rewards]) for beta2, rewards in kinds},
        "by_all_points_alone": coverage(rows, "interval_of_all_points"),
        "largest_noise_floor": max(abs(row["noise_floor"]) for row in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=200)
    parser.add_argument("--first", type=int, default=600, help="number of the first study")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()
    rows = measured(arguments.first, arguments.studies)
    tree = {
        "seconds": round(time.monotonic() - start),
        "coverage": {name: summary(own) for name, own in rows.items()},
        "studies": rows[next(iter(DRAWN))],
    }
    write_atomic(arguments.out, (json.dumps(tree, indent=1, allow_nan=False) + "\n").encode())
    for name, own in tree["coverage"].items():
        print(name, json.dumps({key: own[key] for key in ("all", "by_all_points_alone")}))


if __name__ == "__main__":
    main()
