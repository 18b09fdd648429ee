"""Which curves of a run's metrics belong together, and what to look for in each group."""

from collections.abc import Mapping, Sequence
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
    rare: bool = False  # most lines have 0: of the others none is left out where lines are too many to draw


HEALTH = (
    Panel(
        title="Regression: slope and R²",
        keys=("slope", "r_squared"),
        note="of the scaled log-ratio on what it should be: both 0 at the start; R² should rise, "
        "the slope towards 1 with equal betas alone: with the paper's it stays near 0",
    ),
    Panel(
        title="Residual",
        keys=("residual_mean", "residual_std"),
        note="the scaled log-ratio minus what it should be, in units of reward",
    ),
    Panel(
        title="Log-ratio D of a response",
        keys=("logratio_mean", "logratio_p05", "logratio_p50", "logratio_p95"),
        note="ln pi - ln pi_ref, nats: tails that run away come before a reward that falls",
    ),
    Panel(title="KL a token", keys=("kl_token",), note="from the reference, nats"),
    Panel(title="Entropy a token", keys=("entropy",), note="nats; near 0 the policy explores no more"),
    Panel(
        title="Engine's gap",
        keys=("engine_gap", "engine_gap_max"),
        note="trainer's minus engines' log-prob of a response, nats: mean, and the largest by size",
    ),
    Panel(title="Value", keys=("v_star_mean", "v_star_shift", "value_mean", "value_error"), note="in units of reward"),
    Panel(title="Weights", keys=("weight_mean", "effective_share"), note="of responses that older weights drew"),
    Panel(title="Prompts of no use", keys=("unstable_share", "flat_groups"), note="shares"),
    Panel(
        title="Steps left out",
        keys=("skipped_steps", "critic_skipped_steps"),
        note="a loss was not finite",
        rare=True,
    ),
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


type Line = Mapping[str, Any]
type Curves = dict[str, list[Any]]


def drawn(lines: Sequence[Line], every: int, keys: Sequence[str] = ()) -> list[Line]:
    """Return one in `every` lines, with the newest, and all others that have a number beside 0 under one of `keys`."""
    newest = len(lines) - 1
    return [
        line for place, line in enumerate(lines) if not (newest - place) % every or any(line.get(key) for key in keys)
    ]


def curves(panel: Panel, lines: Sequence[Line]) -> Curves:
    """Return the curves of a panel that have a number in `lines`, by key: a value a line, None where it has none."""
    values = {key: [line.get(key) for line in lines] for key in panel.keys}
    return {key: column for key, column in values.items() if any(value is not None for value in column)}


def scores(lines: Sequence[Line]) -> Curves:
    """Return the greedy score of each set of problems that was evaluated while training, as a curve."""
    evaluated = [greedy_scores(line) for line in lines]
    return {name: [known.get(name) for known in evaluated] for name in dict.fromkeys(chain.from_iterable(evaluated))}
