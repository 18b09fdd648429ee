"""Which curves of a run's metrics belong together, and what to look for in each group."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from astar_megatron.run.tracking import greedy_scores


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """Curves on one axis, by their keys in a line of metrics; a method that lacks one has no such curve."""

    title: str
    keys: tuple[str, ...]
    note: str = ""


HEALTH = (
    Panel(
        title="Regression: slope and R²",
        keys=("slope", "r_squared"),
        note="of the scaled log-ratio on what it should be: 0 at the start, 1 at the optimum; both should rise",
    ),
    Panel(
        title="Residual",
        keys=("residual_mean", "residual_std"),
        note="of that line, in units of reward",
    ),
    Panel(
        title="Log-ratio D of a response",
        keys=("logratio_mean", "logratio_p05", "logratio_p50", "logratio_p95"),
        note="ln pi - ln pi_ref, nats: tails that run away come before a reward that falls",
    ),
    Panel(title="KL a token", keys=("kl_token",), note="from the reference, nats"),
    Panel(title="Entropy a token", keys=("entropy",), note="nats; near 0 the policy explores no more"),
    Panel(title="Engine's gap", keys=("engine_gap",), note="trainer's minus engines' log-prob of a response, nats"),
    Panel(title="Value", keys=("v_star_mean", "v_star_shift", "value_mean", "value_error"), note="in units of reward"),
    Panel(title="Prompts of no use", keys=("unstable_share", "flat_groups"), note="shares"),
    Panel(title="Steps left out", keys=("skipped_steps", "critic_skipped_steps"), note="a loss was not finite"),
)
CURVES = (
    Panel(title="Reward", keys=("reward_mean",), note="mean over the step's responses"),
    Panel(title="Loss", keys=("loss", "critic_loss")),
    Panel(title="Gradient's norm", keys=("grad_norm", "critic_grad_norm"), note="before clipping"),
    Panel(title="Learning rate", keys=("lr",)),
    Panel(title="Changed weights", keys=("changed_weights",), note="share that is not the reference's"),
    Panel(title="Cut by the token limit", keys=("truncated",), note="share of responses"),
    Panel(title="Staleness", keys=("staleness_mean", "staleness_max"), note="versions"),
    Panel(title="Response tokens", keys=("response_tokens",), note="of the step"),
    Panel(title="Tokens a second", keys=("tokens_per_second",), note="of reference, policy and critic"),
    Panel(title="Use of the accelerators", keys=("mfu",), note="model FLOPs over the peak"),
)


type Curves = dict[str, list[Any]]


def curves(panels: Sequence[Panel], lines: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Panel, Curves]]:
    """Yield each panel that has a number in `lines`, with its curves by key: a value a line, None where it has none."""
    for panel in panels:
        values = {key: [line.get(key) for line in lines] for key in panel.keys}
        if known := {key: column for key, column in values.items() if any(value is not None for value in column)}:
            yield panel, known


def scores(lines: Sequence[Mapping[str, Any]]) -> Curves:
    """Return the greedy score of each set of problems that was evaluated while training, as a curve."""
    evaluated = [greedy_scores(line) for line in lines]
    return {name: [known.get(name) for known in evaluated] for name in dict.fromkeys(chain.from_iterable(evaluated))}
